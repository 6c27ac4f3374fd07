"""The holder: a tiny process that keeps what must survive a killed worker.

When the last descriptor of a fanotify group closes, the kernel *allows* the reads that
wait, and holes are read as zeros (spec ondemand 5.10). So a second process keeps a copy of
each group, the shared memory with the events that are being worked on (`journal`), and the
list of images in use. Readers wait while a successor of a killed worker takes all that over;
if none comes in time, the holder fails their reads, and never allows one.

`process`, `journal` and `wire` use the standard library only and import quickly; `link` is
the worker's side. Nothing is imported here.
"""
