// A proxy snapshotter for tests: containerd's overlay, mounted through nydus-overlayfs.
//
// Usage: helpersnapshotter ROOT SOCKET OPTIONS. Every overlay mount that it answers gets the
// type fuse.nydus-overlayfs, and the options in the file OPTIONS, one in each line.
package main

import (
	"context"
	"log"
	"net"
	"os"
	"strings"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"google.golang.org/grpc"
)

type helped struct {
	snapshots.Snapshotter
	options []string
}

func (h helped) change(mounts []mount.Mount, err error) ([]mount.Mount, error) {
	for i := range mounts {
		if mounts[i].Type == "overlay" {
			mounts[i].Type = "fuse.nydus-overlayfs"
			mounts[i].Options = append(mounts[i].Options, h.options...)
		}
	}
	return mounts, err
}

func (h helped) Prepare(ctx context.Context, key, parent string, o ...snapshots.Opt) ([]mount.Mount, error) {
	return h.change(h.Snapshotter.Prepare(ctx, key, parent, o...))
}

func (h helped) View(ctx context.Context, key, parent string, o ...snapshots.Opt) ([]mount.Mount, error) {
	return h.change(h.Snapshotter.View(ctx, key, parent, o...))
}

func (h helped) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	return h.change(h.Snapshotter.Mounts(ctx, key))
}

func serve(root, socket, options string) error {
	text, err := os.ReadFile(options)
	if err != nil {
		return err
	}
	inner, err := overlay.NewSnapshotter(root)
	if err != nil {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	service := snapshotservice.FromSnapshotter(helped{inner, strings.Fields(string(text))})
	snapshotsapi.RegisterSnapshotsServer(server, service)
	return server.Serve(listener)
}

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: helpersnapshotter ROOT SOCKET OPTIONS")
	}
	log.Fatal(serve(os.Args[1], os.Args[2], os.Args[3]))
}
