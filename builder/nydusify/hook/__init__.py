"""Hook plug-ins: programs that are told before and after a manifest is pushed (tools 15.9).

They are made with hashicorp/go-plugin over net/rpc. `plugin` starts them and says what go-plugin
says, `rpc` calls methods as Go's net/rpc does, `gob` encodes the values, `yamux` carries several
streams over one connection. Only what a client of such programs needs is here; all that comes
from the program is checked.
"""
