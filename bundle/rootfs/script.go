package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Script is a program that may change the image before it is made. It sees
// the volume writable at a path that is its only argument; what it writes goes
// to a scratch directory and into the image, never to the volume.
type Script struct {
	Path string
	// Dir is where scratch space is made, on a filesystem that overlayfs can
	// write to (ext4, xfs, btrfs, tmpfs); "" is the system's temporary directory.
	Dir string
	// Stdout and Stderr take the script's output; nil drops it.
	Stdout, Stderr io.Writer
}

// overlay is a writable view of the volume: an overlayfs for each captured
// mount, in a mount namespace of its own that a locked thread keeps alive. The
// namespace ends with the thread, at the latest with the process, however
// that ends; a shell waiting on a pipe then removes the scratch directory.
type overlay struct {
	scratch string
	merged  string // the view, as a path within the namespace
	fd      int
	infos   []*mountinfo.Info // mounts in the namespace
	done    chan struct{}     // closed to end the thread
	ended   chan struct{}
	sweeper *exec.Cmd
	pipe    io.Closer
}

// scriptWait is how long a script's output is waited for once it has ended
// and left processes behind that hold it open.
const scriptWait = 5 * time.Second

// runScript shows volume's captured mounts to the script and waits for it.
func runScript(ctx context.Context, s *Script, volume string, mounts *mountTable) (*overlay, error) {
	path, err := filepath.Abs(s.Path)
	if err != nil {
		return nil, err
	}
	if err := unix.Access(path, unix.X_OK); err != nil {
		return nil, fmt.Errorf("the script %s cannot be run: %w", path, err)
	}
	o := &overlay{fd: -1, done: make(chan struct{}), ended: make(chan struct{})}
	if o.scratch, err = os.MkdirTemp(s.Dir, "instar-script-"); err != nil {
		return nil, err
	}
	o.merged = filepath.Join(o.scratch, "root")
	if err := o.startSweeper(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(o.scratch))
	}
	ready := make(chan error)
	go func() {
		defer close(o.ended)
		// Never unlocked: the thread ends with the goroutine, and with it
		// the mount namespace.
		runtime.LockOSThread()
		if err := o.mount(volume, mounts); err != nil {
			ready <- fmt.Errorf("making a writable view of %s for the script: %w", volume, err)
			return
		}
		if err := run(ctx, s, path, o.merged); err != nil {
			ready <- err
			return
		}
		ready <- o.open()
		<-o.done
	}()
	if err := <-ready; err != nil {
		return nil, errors.Join(err, o.close())
	}
	return o, nil
}

// startSweeper starts a shell that removes the scratch directory as soon as
// this process closes the pipe or is gone.
func (o *overlay) startSweeper() error {
	o.sweeper = exec.Command("/bin/sh", "-c", `read -r _; while ! rm -rf -- "$0" && sleep 1; do :; done`, o.scratch)
	o.sweeper.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	pipe, err := o.sweeper.StdinPipe()
	if err != nil {
		return err
	}
	o.pipe = pipe
	return o.sweeper.Start()
}

func (o *overlay) close() error {
	close(o.done)
	<-o.ended
	if o.fd >= 0 {
		unix.Close(o.fd)
	}
	err := o.pipe.Close()
	return errors.Join(err, o.sweeper.Wait())
}

// mount makes the view, on a thread of its own.
func (o *overlay) mount(volume string, mounts *mountTable) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unsharing the mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making the mounts private: %w", err)
	}
	for i, m := range mounts.all {
		at := filepath.Join(o.merged, m.path)
		if m == mounts.root {
			if err := os.Mkdir(at, 0o755); err != nil {
				return err
			}
		}
		st, err := os.Lstat(at)
		switch {
		case err != nil:
			continue // within a mount that is not captured
		case m.use && st.IsDir():
			err = o.layer(i, filepath.Join(volume, m.path), at)
		case m.use:
			if err = unix.Mount(filepath.Join(volume, m.path), at, "", unix.MS_BIND, ""); err == nil {
				err = unix.Mount("", at, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
			}
		case st.IsDir():
			err = unix.Mount("instar", at, "tmpfs", unix.MS_RDONLY, "size=4k,nr_inodes=2,mode=755")
		}
		if err != nil {
			return fmt.Errorf("mounting %s: %w", at, err)
		}
	}
	return nil
}

// layer mounts an overlayfs that shows lower. Its directories are named by
// handles: paths may hold the commas and colons that separate options.
func (o *overlay) layer(n int, lower, at string) error {
	dir := filepath.Join(o.scratch, strconv.Itoa(n))
	upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755)); err != nil {
		return err
	}
	low, err := unix.Open(lower, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(low)
	// The upper root's own attributes win over the lower root's.
	if err := copyRoot(lower, upper); err != nil {
		return err
	}
	opts := fmt.Sprintf("lowerdir=/proc/self/fd/%d,upperdir=%s,workdir=%s", low, upper, work)
	for _, more := range []string{",index=on,xino=on", ",xino=on", ""} {
		// What keeps hard links together is not there on every filesystem.
		if err = unix.Mount("instar", at, "overlay", 0, opts+more); err == nil {
			return nil
		}
	}
	return fmt.Errorf("overlayfs with scratch space in %s: %w", o.scratch, err)
}

// copyRoot gives dir the owner, mode, attributes and times of from.
func copyRoot(from, dir string) error {
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return err
	}
	fd, err := unix.Open(from, openDir&^unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r := newInodeReader()
	xs, _ := r.xattrs(func(b []byte) (int, error) { return unix.Flistxattr(fd, b) },
		func(name string, b []byte) (int, error) { return unix.Fgetxattr(fd, name, b) })
	for _, x := range xs {
		if !strings.HasPrefix(x.Name, "trusted.overlay.") {
			_ = unix.Setxattr(dir, x.Name, x.Value, 0)
		}
	}
	return errors.Join(os.Chown(dir, int(st.Uid), int(st.Gid)), unix.Chmod(dir, st.Mode&0o7777),
		unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{st.Atim, st.Mtim}, 0))
}

// run starts the script in the calling thread's mount namespace. It does not
// outlive this process, nor ctx.
func run(ctx context.Context, s *Script, path, merged string) error {
	cmd := exec.CommandContext(ctx, path, merged)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = s.Stdout, s.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = scriptWait
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("the script %s failed: %w", path, errors.Join(err, context.Cause(ctx)))
	}
	return nil
}

// open takes the view over, as the script has left it.
func (o *overlay) open() error {
	var err error
	if o.fd, err = unix.Open(o.merged, openDir, 0); err != nil {
		return err
	}
	o.infos, err = mountinfo.GetMounts(nil)
	return err
}
