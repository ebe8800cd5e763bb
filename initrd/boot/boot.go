// Package boot is what runs inside the initrd: it makes the network, asks the
// metadata server who this instance is, gets it its root, makes that root the
// instance's own and hands over to the system in it.
//
// In go the initrd's configuration, the kernel's instar.* parameters (see
// [Config]) and what metadata says; out comes a running system, or the reason
// why not, on the console. It runs as process 1 of an initramfs and touches
// everything there; of disks, the one the root is written to or lies on.
package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// step is one stage of the boot.
type step struct {
	name     string
	deadline time.Duration // for all attempts within the step, before Config.Patience
	run      func(m *machine, ctx context.Context) error
}

// network is the first step that a retry repeats.
const retryFrom = "network"

// steps is the order of the boot.
func steps() []step {
	return []step{
		{"mounts", 10 * time.Second, (*machine).mounts},
		{"config", 5 * time.Second, (*machine).configure},
		{"modules", 30 * time.Second, (*machine).modules},
		{"network", 60 * time.Second, (*machine).network},
		{"metadata", 120 * time.Second, (*machine).metadata},
		{"root", 30 * time.Minute, (*machine).root},
		{"kexec", 60 * time.Second, (*machine).kexec},
		{"inject", 60 * time.Second, (*machine).inject},
		{"switch", 4 * time.Minute, (*machine).switchRoot},
	}
}

func isStep(name string) bool {
	for _, s := range steps() {
		if s.name == name {
			return true
		}
	}
	return false
}

// errFinal marks an error that another attempt would only repeat.
var errFinal = errors.New("")

// final wraps an error that waiting does not mend.
func final(err error) error { return fmt.Errorf("%w%w", errFinal, err) }

// machine is the machine being booted and what is known of it so far.
type machine struct {
	config  Config
	console io.Writer
	start   time.Time

	net      network
	client   *metadataClient
	instance instance
	handed   *instance // by the initrd before this one; nil if there was none
	disk     *rootDisk
	lazy     *lazyRoot // that the root lies on; nil if it is on the disk
	holder   string    // of the launch ticket, from the first try on
}

// say writes a line to the console.
func (m *machine) say(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	fmt.Fprintf(m.console, "instar: [%6.2f] %s\n", time.Since(m.start).Seconds(), printable(line))
}

// printable keeps what comes from outside from moving the cursor.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\t' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

// Main boots the machine. It returns only if it is not process 1 of an
// initramfs.
func Main() error {
	if os.Getpid() != 1 {
		return errors.New("this is the init of an initrd: it runs as process 1 only")
	}
	m := &machine{console: os.Stdout, start: time.Now()}
	m.config = Config{}.withDefaults()
	// The machine may be small, and the image passes through.
	debug.SetGCPercent(50)
	first := ""
	for {
		err := m.boot(context.Background(), first)
		if err == nil {
			m.say("stopped after %s, as instar.stop says", m.config.Stop)
			m.fail(PowerOff)
		}
		m.fail(m.config.Fail)
		// Only a retry comes back.
		first = retryFrom
	}
}

// boot runs the steps, from the one named on. It returns nil after the step
// that instar.stop names; after the last there is no return.
func (m *machine) boot(ctx context.Context, from string) error {
	skipping := from != ""
	for _, s := range steps() {
		if skipping && s.name != from {
			continue
		}
		skipping = false
		limit := m.config.limit(s)
		stepCtx, cancel := context.WithTimeout(ctx, limit)
		err := s.run(m, stepCtx)
		cancel()
		if err != nil {
			if errors.Is(err, context.DeadlineExceeded) {
				err = fmt.Errorf("%w (the step's deadline, %v)", err, limit)
			}
			m.say("FAILED %s: %s", s.name, strings.ReplaceAll(err.Error(), "\n", "; "))
			return err
		}
		if m.config.Stop == s.name {
			return nil
		}
	}
	return errors.New("the last step came back")
}

// fail does what the policy says. It returns for a retry.
func (m *machine) fail(p Policy) {
	m.cleanUp()
	pause := time.Duration(m.config.Pause) * time.Second
	switch p {
	case Retry:
		m.say("trying again from %s in %v", retryFrom, pause)
		time.Sleep(pause)
		return
	case Reboot:
		m.say("rebooting in %v", pause)
		time.Sleep(pause)
		unix.Sync()
		unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case PowerOff:
		m.say("powering off")
		unix.Sync()
		unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case Shell:
		m.shell()
		return
	}
	m.say("halted")
	for {
		time.Sleep(time.Hour)
	}
}

// shell runs the rescue shell; when it ends, the boot is tried again.
func (m *machine) shell() {
	if !m.config.AllowShell {
		m.say("no shell: the initrd was not built to allow one")
		time.Sleep(time.Duration(m.config.Pause) * time.Second)
		return
	}
	m.say("a shell; the boot is tried again when it ends")
	cmd := exec.Command("/bin/sh")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = []string{"PATH=/bin", "HOME=/", "TERM=linux"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Run(); err != nil {
		m.say("the shell ended: %v", err)
		time.Sleep(time.Second)
	}
}

// cleanUp undoes what a second attempt does again.
func (m *machine) cleanUp() {
	unix.Unmount(rootDir, unix.MNT_DETACH)
	m.disk = nil
	if m.lazy != nil {
		m.lazy.stop()
		m.lazy = nil
	}
}

// until calls try until it succeeds, fails for good or ctx ends, with growing
// pauses between. The error has the last reason in it.
func until(ctx context.Context, try func(context.Context) error) error {
	wait := 250 * time.Millisecond
	for {
		err := try(ctx)
		if err == nil || errors.Is(err, errFinal) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", err, ctx.Err())
		case <-time.After(wait):
		}
		wait = min(2*wait, 5*time.Second)
	}
}
