// hookplugin is a hook of nydusify as its users write them: hashicorp/go-plugin over net/rpc.
//
// It appends each call to the file HOOK_RECORD, as a line of JSON, and refuses the method that
// HOOK_REFUSE names. HOOK_CRASH names one in which it ends at once, HOOK_HANG one that never
// returns.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/rpc"
	"os"

	"github.com/hashicorp/go-plugin"
)

// Blob and Info are what nydusify says of an image (names are part of the protocol).
type Blob struct {
	ID   string `json:"id"`
	Size int64  `json:"size"`
}

type Info struct {
	BootstrapPath string `json:"bootstrap_path"`
	SourceRef     string `json:"source_ref"`
	TargetRef     string `json:"target_ref"`
	Blobs         []Blob `json:"blobs"`
}

type record struct {
	Method         string `json:"method"`
	BootstrapBytes int64  `json:"bootstrap_bytes"`
	Info
}

type server struct{}

func (server) call(method string, info Info) error {
	fmt.Println("called", method)
	fmt.Fprintln(os.Stderr, "warned by", method)
	switch method {
	case os.Getenv("HOOK_CRASH"):
		os.Exit(3)
	case os.Getenv("HOOK_HANG"):
		select {}
	case os.Getenv("HOOK_REFUSE"):
		return errors.New("refused: größer")
	}
	status, err := os.Stat(info.BootstrapPath)
	if err != nil {
		return err
	}
	file, err := os.OpenFile(os.Getenv("HOOK_RECORD"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	return json.NewEncoder(file).Encode(record{method, status.Size(), info})
}

func (s server) BeforePushManifest(info Info, answer *error) error {
	*answer = s.call("BeforePushManifest", info)
	return *answer
}

func (s server) AfterPushManifest(info Info, answer *error) error {
	*answer = s.call("AfterPushManifest", info)
	return *answer
}

type hook struct{}

func (hook) Server(*plugin.MuxBroker) (interface{}, error) { return server{}, nil }

func (hook) Client(*plugin.MuxBroker, *rpc.Client) (interface{}, error) {
	return nil, errors.New("no client here")
}

func main() {
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: plugin.HandshakeConfig{
			ProtocolVersion:  1,
			MagicCookieKey:   "NYDUS_HOOK_PLUGIN",
			MagicCookieValue: "nydus-hook-plugin",
		},
		Plugins: map[string]plugin.Plugin{"hook": hook{}},
	})
}
