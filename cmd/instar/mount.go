package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/syslog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/initrd/lazyroot/fusefile"
)

type mountOptions struct {
	viewOptions
	foreground bool
}

func newMount(a *app) *cobra.Command {
	var o mountOptions
	const test = "mount"
	cmd := a.named("mount IMAGE DIR", "mount an image's filesystem here, fetched as it is read", `
Mounts the filesystem of an image at a directory without bringing the image here
first: what is read is fetched, verified and then given away. It is read-only
unless --overlay or --overlay-file is given; the image never changes.

"instar umount DIR", or umount(8), ends it, and with it the server, a process that
stays in the background; --foreground keeps it here instead. It needs root, FUSE
(/dev/fuse) and a loop device. Without these, "instar nbd" serves the same disk
to a virtual machine. A store that does not answer is waited for, a quarter of an hour; then
who reads is given an error, never wrong bytes. The server tells syslog of damage.
`+aboutNames, `
  instar mount web-1 /mnt --store s3://images/fleet
  instar mount web-1@parent /mnt --store /backup/images --overlay
  instar umount /mnt`, 2, 2,
		func(ctx context.Context, args []string) error { return runMount(ctx, a, &o, args[0], args[1]) })
	cmd.ValidArgsFunction = func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) == 1 {
			return nil, cobra.ShellCompDirectiveFilterDirs
		}
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	f := flagsOf(cmd)
	f.yes(&o.foreground, "foreground", "", "stay, and tell of damage here; an interrupt unmounts", ofUs, test)
	o.viewOptions.add(a, cmd, test)
	return cmd
}

func newUmount(a *app) *cobra.Command {
	cmd := a.named("umount DIR", "unmount what \"mount\" mounted, and wait for its server to end", `
Unmounts the filesystem at a directory, and returns when the server behind it has
ended: what was written to an overlay file is durable then.`, `
  instar umount /mnt`, 1, 1, func(_ context.Context, args []string) error { return runUmount(a, args[0]) })
	cmd.ValidArgsFunction = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveFilterDirs
	}
	return cmd
}

// mountServer is the variable that tells a process that it is the server in
// the background: the number of the file to say on that it is ready.
const mountServer = "INSTAR_MOUNT_SERVER"

// mountsDir is where servers have their FUSE files. Paths below it tell umount whose mounts are ours.
const mountsDir = "/run/instar/mounts"

// mounted is what the server says when it is ready, or why it never is.
type mounted struct {
	Error string `json:"error,omitempty"`
	Hint  string `json:"hint,omitempty"`
	Code  int    `json:"code,omitempty"`

	Image    string `json:"image"`
	Manifest string `json:"manifest"`
	Size     int64  `json:"size"`
	ReadOnly bool   `json:"read_only"`
}

func runMount(ctx context.Context, a *app, o *mountOptions, ref, dir string) error {
	if os.Geteuid() != 0 {
		return withHint(failf(exitFile, "mounting needs root: a loop device and mount(2)"), "\"instar nbd IMAGE --socket PATH\" serves the same disk without privileges.")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return failf(exitFile, "%w", err)
	}
	if st, err := os.Stat(dir); err != nil {
		return failf(exitFile, "%w", err)
	} else if !st.IsDir() {
		return failf(exitFile, "%s is not a directory", dir)
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		return withHint(failf(exitFile, "mounting needs FUSE: %w", err), "modprobe fuse loads it, where it is a module.")
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return failf(exitFile, "%w", err)
	}
	if a.getenv(mountServer) != "" {
		parent := os.NewFile(3, "ready")
		defer parent.Close()
		err := serveMount(ctx, a, o, ref, dir, parent)
		if err == nil {
			return nil
		}
		m := mounted{Error: err.Error(), Code: exitCode(err)}
		if e, ok := errors.AsType[*exitError](err); ok {
			m.Hint = e.hint
		}
		// Who started it says it, if it still waits.
		return errors.Join(json.NewEncoder(parent).Encode(m), errShown)
	}
	if o.foreground {
		return serveMount(ctx, a, o, ref, dir, nil)
	}
	m, err := background(ctx, a)
	if err != nil {
		return err
	}
	return a.showMounted(m, dir)
}

func (a *app) showMounted(m *mounted, dir string) error {
	how := "writable, in an overlay"
	if m.ReadOnly {
		how = "read-only"
	}
	return a.ui.Result("mounted", fmt.Sprintf("%s@%s is at %s: %s, %s", m.Image, m.Manifest[:12], dir, ui.Size(m.Size), how),
		ui.Fields{"image": m.Image, "manifest": m.Manifest, "directory": dir, "size": m.Size, "read_only": m.ReadOnly})
}

// background starts this command again as a server of its own and waits until it is
// ready, or has failed, which it says itself.
func background(ctx context.Context, a *app) (*mounted, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	self, err := os.Executable()
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	c := &exec.Cmd{Path: self, Args: a.args}
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stderr, os.Stderr
	c.Env = append(os.Environ(), mountServer+"=3")
	c.ExtraFiles = []*os.File{w}
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := errors.Join(c.Start(), w.Close()); err != nil {
		return nil, fmt.Errorf("start the server: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { c.Process.Signal(unix.SIGTERM) })
	defer stop()
	line, err := bufio.NewReader(r).ReadBytes('\n')
	var m mounted
	if err == nil {
		err = json.Unmarshal(line, &m)
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("the server ended before it was ready: %w", errors.Join(c.Wait(), ctx.Err()))
	case m.Error != "":
		return nil, errors.Join(&exitError{m.Code, errors.New(m.Error), m.Hint}, c.Wait())
	}
	return &m, c.Process.Release()
}

// serveMount mounts, tells parent, if there is one, or the user, and serves until
// the mount is gone.
func serveMount(ctx context.Context, a *app, o *mountOptions, ref, dir string, parent *os.File) (err error) {
	alarm, told := a.alarm, func(err error) { a.ui.Warn(err.Error(), nil) }
	if parent != nil {
		// Nobody looks at standard error once it is in the background.
		tell := func(string) error { return nil }
		if l, err := syslog.New(syslog.LOG_DAEMON|syslog.LOG_WARNING, "instar"); err == nil {
			defer l.Close()
			tell = l.Warning
		}
		alarm = func(al lazyroot.Alarm) { tell(fmt.Sprintf("mount %s: %s: %v", dir, al.Source, al.Err)) }
		told = func(err error) { tell(fmt.Sprintf("mount %s: %v", dir, err)) }
	}
	v, err := a.openView(ctx, &o.viewOptions, ref, alarm)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	if err := os.MkdirAll(mountsDir, 0o700); err != nil {
		return failf(exitFile, "%w", err)
	}
	private, err := os.MkdirTemp(mountsDir, "")
	if err != nil {
		return failf(exitFile, "%w", err)
	}
	defer func() { err = errors.Join(err, os.Remove(private)) }()
	file, err := fusefile.Mount(private, v.dev, told)
	if err != nil {
		return withHint(failf(exitFile, "%w", err), "\"instar nbd IMAGE --socket PATH\" serves the same disk without FUSE.")
	}
	gone := false
	defer func() {
		if gone {
			err = errors.Join(err, file.Unmount())
		} else {
			err = errors.Join(err, file.Abort())
		}
	}()
	if err := mountDisk(v, file.Path(), dir); err != nil {
		return err
	}
	m := &mounted{Image: v.img.Manifest.Name, Manifest: v.img.Name.String(), Size: v.dev.Size(), ReadOnly: v.dev.ReadOnly()}
	if parent != nil {
		if err := ready(parent, m); err != nil {
			return errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
		}
	} else if err := a.showMounted(m, dir); err != nil {
		return errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
	}
	select {
	case <-file.Idle():
	case <-ctx.Done():
		if err := unix.Unmount(dir, 0); err != nil {
			a.ui.Warn(fmt.Sprintf("%s is in use and will be gone when it is not: %v", dir, err), nil)
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				return failf(exitFile, "unmounting %s: %w", dir, err)
			}
		}
		<-file.Idle()
	}
	gone = true
	return nil
}

// ready tells who started the server that it serves, and lets go of what they share.
func ready(parent *os.File, m *mounted) error {
	if err := errors.Join(json.NewEncoder(parent).Encode(m), parent.Close()); err != nil {
		return fmt.Errorf("tell that the mount is ready: %w", err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for fd := range 3 {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return err
		}
	}
	return os.Chdir("/")
}

// mountDisk mounts the filesystem in a disk, which a partition table may be around.
func mountDisk(v *view, path, dir string) error {
	var part fusefile.Range
	kind := disk.Kind(v.img.Manifest.Partition)
	if kind != disk.None && kind != "" {
		part.Off = kind.Start()
		part.Len = v.dev.Size() - kind.Overhead()
	}
	loop, err := fusefile.Attach(path, part, v.dev.ReadOnly())
	if err != nil {
		return failf(exitFile, "%w", err)
	}
	defer loop.Close()
	flags, options := uintptr(0), ""
	if v.dev.ReadOnly() {
		flags = unix.MS_RDONLY
	}
	fs := v.img.Manifest.Filesystem
	if fs == "xfs" {
		options = "nouuid" // its origin may be mounted here too
	}
	err = unix.Mount(loop.Name(), dir, fs, flags, options)
	if err != nil && v.dev.ReadOnly() {
		// A journal that was not empty when the disk was copied cannot be replayed.
		if again, ok := map[string]string{"ext4": "noload", "ext3": "noload", "xfs": "norecovery,nouuid"}[fs]; ok {
			if unix.Mount(loop.Name(), dir, fs, flags, again) == nil {
				return nil
			}
		}
	}
	if err != nil {
		return withHint(failf(exitFile, "mounting the %s filesystem of %s: %w", fs, v.img.Manifest.Name, err), "\"instar nbd\" serves the disk without mounting it.")
	}
	return nil
}

func runUmount(a *app, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return failf(exitFile, "%w", err)
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return failf(exitFile, "%w", err)
	}
	private, err := mountedBy(dir)
	if err != nil {
		return err
	}
	if err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW); err != nil {
		if errors.Is(err, unix.EBUSY) {
			return withHint(failf(exitFile, "%s is in use", dir), "fuser -vm %s shows by whom.", dir)
		}
		return failf(exitFile, "unmounting %s: %w", dir, err)
	}
	for begun := time.Now(); time.Since(begun) < time.Minute; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Lstat(private); errors.Is(err, os.ErrNotExist) {
			return a.ui.Result("unmounted", dir+" is unmounted", ui.Fields{"directory": dir})
		}
	}
	return failf(exitFile, "%s is unmounted, but its server has not ended: is it mounted in another mount namespace too?", dir)
}

// mountedBy is the server's directory of the mount at dir.
func mountedBy(dir string) (string, error) {
	list, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
	if err != nil {
		return "", failf(exitFile, "%w", err)
	}
	if len(list) == 0 {
		return "", failf(exitFile, "nothing is mounted at %s", dir)
	}
	backing, err := os.Open(filepath.Join("/sys/block", filepath.Base(list[len(list)-1].Source), "loop", "backing_file"))
	if err == nil {
		defer backing.Close()
		b, rerr := io.ReadAll(io.LimitReader(backing, 4096))
		if private := filepath.Dir(strings.TrimSpace(string(b))); rerr == nil && filepath.Dir(private) == mountsDir {
			return private, nil
		}
	}
	return "", withHint(failf(exitFile, "what is mounted at %s is not of \"instar mount\"", dir), "umount(8) unmounts it.")
}
