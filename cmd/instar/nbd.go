package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/initrd/lazyroot/nbd"
	"github.com/instar-image/instar/internal/serving"
)

type nbdOptions struct {
	viewOptions
	socket, listen string
}

func newNBD(a *app) *cobra.Command {
	var o nbdOptions
	const test = "nbd"
	cmd := a.named("nbd IMAGE", "serve an image's disk to NBD clients, fetched as it is read", `
Serves the disk of an image by the NBD protocol, for qemu, nbd-client, nbdcopy
and whoever speaks it, without bringing it here first: what is read is fetched,
verified, and given away. It runs until it is interrupted.

It is read-only unless --overlay or --overlay-file is given. Whoever can connect
reads the whole image, and writes to the overlay: the socket is for its owner
alone, and --listen takes an address of this machine's loopback only, of which
all its users are. A store that does not answer is waited for, a quarter of an hour;
then the client is given an error, never wrong bytes.
`+aboutNames, `
  instar nbd web-1 --store s3://images/fleet --socket /run/user/1000/web-1.sock
  qemu-system-x86_64 -m 2048 -drive file=nbd+unix:///?socket=/run/user/1000/web-1.sock,format=raw,if=virtio -snapshot
  instar nbd web-1 --store /backup/images --listen 127.0.0.1:10809 --overlay`, 1, 1,
		func(ctx context.Context, args []string) error { return runNBD(ctx, a, &o, args[0]) })
	f := flagsOf(cmd)
	f.text(&o.socket, "socket", "", "listen at a unix socket, which is made: `PATH`", ofUs, test)
	completeFiles(cmd, "socket")
	f.text(&o.listen, "listen", "", "listen at `ADDRESS:PORT` of the loopback; port 0 takes a free one", ofUs, test)
	o.viewOptions.add(a, cmd, test)
	return cmd
}

// listenNBD listens where the options say, and gives the URI of the export.
func listenNBD(ctx context.Context, o *nbdOptions) (net.Listener, string, error) {
	switch {
	case (o.socket == "") == (o.listen == ""):
		return nil, "", usagef("one of --socket and --listen is needed")
	case o.listen != "":
		host, _, err := net.SplitHostPort(o.listen)
		if err != nil {
			return nil, "", usagef("--listen: %w", err)
		}
		if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return nil, "", withHint(usagef("--listen: %s is not of the loopback", o.listen), "NBD knows neither passwords nor encryption. ssh -L brings a socket to another machine.")
		}
		l, err := net.Listen("tcp", o.listen)
		if err != nil {
			return nil, "", failf(exitFile, "--listen: %w", err)
		}
		return l, "nbd://" + l.Addr().String(), nil
	}
	path, err := filepath.Abs(o.socket)
	if err != nil {
		return nil, "", failf(exitFile, "--socket: %w", err)
	}
	l, err := serving.Unix(ctx, path, 0o600)
	if err != nil {
		return nil, "", failf(exitFile, "--socket: %w", err)
	}
	return l, "nbd+unix:///?socket=" + url.QueryEscape(path), nil
}

func runNBD(ctx context.Context, a *app, o *nbdOptions, ref string) error {
	l, uri, err := listenNBD(ctx, o)
	if err != nil {
		return err
	}
	defer l.Close()
	v, err := a.openView(ctx, &o.viewOptions, ref, a.alarm)
	if err != nil {
		return err
	}
	err = a.ui.Result("serving", fmt.Sprintf("%s@%s is at %s: %s, %s", v.img.Manifest.Name, v.img.Name.String()[:12], uri, ui.Size(v.dev.Size()), writable(v.dev)),
		ui.Fields{"image": v.img.Manifest.Name, "manifest": v.img.Name.String(), "uri": uri, "size": v.dev.Size(), "read_only": v.dev.ReadOnly()})
	if err == nil {
		err = nbd.Serve(ctx, l, v.dev, nbd.Options{Description: v.img.Manifest.Name + "@" + v.img.Name.String(), MultiConn: true, Shutdown: 5 * time.Second}, func(err error) {
			if err != nil {
				a.ui.Debug("a client went", ui.Fields{"error": err.Error()})
			}
		})
	}
	return errors.Join(err, v.close())
}

func writable(d *lazyroot.Device) string {
	if d.ReadOnly() {
		return "read-only"
	}
	return "writable"
}

// alarm warns of what is damaged in the store.
func (a *app) alarm(al lazyroot.Alarm) {
	if al.Final {
		a.ui.Warn(fmt.Sprintf("this cannot be read: %v", al.Err), ui.Fields{"source": al.Source})
		return
	}
	a.ui.Debug("read again elsewhere", ui.Fields{"source": al.Source, "error": al.Err.Error()})
}
