package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/initrd/launch"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/initrd/lazyroot/nbd"
)

// checkRecord says what of launch's options does not go with --record-trace.
func (o *launchOptions) checkRecord() error {
	switch {
	case !o.recordTrace && (o.recordFor != 0 || o.sign != ""):
		return usagef("--record-for and --sign go with --record-trace")
	case !o.recordTrace:
		return nil
	case o.image == "":
		return usagef("--record-trace is for an Instar image, which is to be named")
	case o.lazy || o.disk != "" || o.keep || o.diskSize != 0:
		return usagef("--record-trace boots the image as it is: --lazy, --disk, --keep and --disk-size do not go with it")
	case o.recordFor < 0:
		return usagef("--record-for is a positive number")
	}
	return nil
}

// recording serves an image's disk to a machine and notes what that reads.
type recording struct {
	a      *app
	l      *launchedImage
	signer keys.Signer
	after  time.Duration // once sshd answers
	device *lazyroot.Device
	reads  *launch.Reads
	socket string
	stop   context.CancelFunc
	served chan error
}

// record opens the image's disk for a machine, read from the store as it is
// needed, at a socket in dir.
func (o *launchOptions) record(ctx context.Context, a *app, l *launchedImage, dir string) (*recording, error) {
	r := &recording{a: a, l: l, after: 20 * time.Second, socket: filepath.Join(dir, "nbd"), served: make(chan error, 1)}
	if o.recordFor > 0 {
		r.after = time.Duration(o.recordFor) * time.Second
	}
	// Who may sign is found out before anything is booted.
	var err error
	if r.signer, err = a.signer(ctx, o.images(), o.sign); err != nil {
		return nil, err
	}
	trust, err := trusted(a.machineKeys(o.images(), "", false))
	if err != nil {
		return nil, err
	}
	name := l.image.Manifest.Name
	if _, err := trust.Check(r.signer.Public(), name, chunked.NamespaceTrace); err != nil {
		return nil, withHint(&exitError{code: exitTrust, err: err}, "Who signs boot traces of %s is to be in allowed_signers, for the namespace %s.", name, chunked.NamespaceTrace)
	}
	image, err := lazyroot.NewImage(l.index, lazyroot.ImageOptions{Memory: 64 << 20})
	if err != nil {
		return nil, err
	}
	r.reads = launch.NewReads(image.Size())
	if r.device, err = lazyroot.Open(ctx, lazyroot.Options{Image: image, OnRead: r.reads.Note}); err != nil {
		return nil, err
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "unix", r.socket)
	if err != nil {
		return nil, errors.Join(failf(exitFile, "serving the disk: %w", err), r.device.Close())
	}
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	r.stop = stop
	go func() { r.served <- nbd.Serve(serving, listener, r.device, nbd.Options{}, nil) }()
	return r, nil
}

func (r *recording) close() error {
	r.stop()
	return errors.Join(<-r.served, r.device.Close())
}

// run runs the machine until enough is known, and stores the trace.
func (r *recording) run(ctx context.Context, o launch.Options) error {
	running, cancel := context.WithCancel(ctx)
	defer cancel()
	o.Disk, o.NBD, o.Keep = "", r.socket, false
	ready := o.Ready
	var once sync.Once
	enough := false
	o.Ready = func(m launch.Machine) {
		ready(m)
		if !m.SSH {
			return
		}
		once.Do(func() {
			r.a.ui.Say("recording for %s more", r.after)
			select {
			case <-time.After(r.after):
				enough = true
				cancel()
			case <-running.Done():
			}
		})
	}
	err := launch.Run(running, o) // returns when Ready has
	if err != nil && !(enough && ctx.Err() == nil && errors.Is(err, context.Canceled)) {
		return err
	}
	t, err := r.l.image.PutTrace(ctx, r.reads.End(), r.signer)
	if err != nil {
		return fmt.Errorf("the boot was recorded: %w", err)
	}
	return r.a.showTrace(r.l.image, t)
}
