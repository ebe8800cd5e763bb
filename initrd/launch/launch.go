// Package launch boots an image in a virtual machine on this one, with a
// metadata server of its own: what proves that a bundle is a backup.
//
// In go a kernel, an initrd made by package initrd, a disk image and what the
// instance is to be told; out comes a machine that runs until it powers off or
// the context ends. It starts QEMU and listens on 127.0.0.1; of files it
// changes the disk image, and that only if told to keep changes.
package launch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/metadata"
)

// Options say what is launched.
type Options struct {
	Kernel, Initrd string // files
	Disk           string // raw image; the root is found in it
	Keep           bool   // write changes to Disk; else they are gone at the end
	// NBD, if it is not "", is the unix socket of a server of the disk in Disk's
	// place; changes are gone at the end.
	NBD string
	// Image is what Disk, which is empty, is filled with by the machine itself;
	// nil: the root is found on Disk.
	Image *Image
	// Instance is what metadata tells; its Caller is set here.
	Instance metadata.Instance
	User     string // login user; "": root
	Arch     string // x86_64 or aarch64; "": this machine's
	Memory   int    // MiB; 0: 1024
	CPUs     int    // 0: 1
	Accel    string // kvm, tcg; "": kvm where it works, else tcg
	SSHPort  int    // on 127.0.0.1; 0: a free one
	Append   string // further kernel parameters
	Console  io.Writer
	// Ready is told where the machine is reached as soon as it is started,
	// and again, with SSH set, when its sshd answers.
	Ready func(Machine)
	Qemu  string // program; "": qemu-system-ARCH
}

// Machine is a machine that was started.
type Machine struct {
	SSHPort  int
	Metadata string // URL of the metadata server, for the guest
	// NotUsual is why Metadata is not http://169.254.169.254, which then leads
	// from the guest to whatever this machine finds there; else nil.
	NotUsual error
	Accel    string
	SSH      bool // sshd answers
}

// guestHost is this machine as the guest sees it through QEMU's own router.
const guestHost = "10.0.2.2"

// panicked is how a console says that the kernel has given up.
const panicked = "Kernel panic - not syncing"

// ErrPanic is wrapped where the guest's kernel panicked.
var ErrPanic = errors.New("the machine's kernel panicked")

// Run runs a machine until it powers off or ctx ends; then the machine is
// stopped as by pulling its plug, and the error is ctx's. A reboot boots it
// again by the same kernel and initrd.
func Run(ctx context.Context, o Options) error {
	if err := o.complete(); err != nil {
		return err
	}
	if o.SSHPort == 0 {
		port, err := freePort()
		if err != nil {
			return fmt.Errorf("launching: %w", err)
		}
		o.SSHPort = port
	}
	var images *gateway
	var gate net.Listener
	if o.Image != nil {
		var err error
		if gate, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			return fmt.Errorf("launching: %w", err)
		}
		defer gate.Close()
		if images, err = newGateway(o.Image, gate); err != nil {
			return fmt.Errorf("launching: %w", err)
		}
	}
	handler, err := o.metadata(images)
	if err != nil {
		return fmt.Errorf("launching: %w", err)
	}
	// Where connections cannot be redirected.
	fallback, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("launching: %w", err)
	}
	defer fallback.Close()
	m := Machine{SSHPort: o.SSHPort, Metadata: fmt.Sprintf("http://%s:%d", guestHost, fallback.Addr().(*net.TCPAddr).Port), Accel: o.Accel}
	running, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	console := &lastLines{w: o.Console, panicked: func() {
		// The rest of what it has to say follows at once.
		time.AfterFunc(3*time.Second, func() { cancel(ErrPanic) })
	}}
	p, err := start(func(redirected bool) *exec.Cmd {
		if redirected {
			m.Metadata = "http://" + metadataAddress.Addr().String()
		}
		cmd := exec.CommandContext(running, o.Qemu, o.arguments(m.Metadata)...)
		cmd.Stdout, cmd.Stderr = console, console
		// Pipes that a child holds open must not keep us.
		cmd.WaitDelay = 5 * time.Second
		return cmd
	})
	if err != nil {
		return fmt.Errorf("launching: starting %s: %w", o.Qemu, err)
	}
	m.NotUsual = p.refused
	if err := o.guarded(p.refused); err != nil {
		cancel(err)
		<-p.ended
		return fmt.Errorf("launching: %w", err)
	}
	var beside sync.WaitGroup
	defer beside.Wait()
	guests := newPairs()
	if images != nil {
		beside.Go(func() { serve(running, images, gate) })
	}
	if p.refused == nil {
		fallback.Close()
		beside.Go(func() {
			if err := p.redirect(running, guests); err != nil {
				cancel(fmt.Errorf("answering the machine's connections: %w", err))
			}
		})
		beside.Go(func() { serve(running, handler, guests) })
	} else {
		beside.Go(func() { serve(running, handler, fallback) })
	}
	if o.Ready != nil {
		o.Ready(m)
		beside.Go(func() {
			if awaitSSH(running, o.SSHPort) {
				m.SSH = true
				o.Ready(m)
			}
		})
	}
	err = <-p.ended
	ended := running.Err()
	why := context.Cause(running)
	cancel(nil)
	switch {
	case errors.Is(why, ErrPanic):
		return fmt.Errorf("launching: %w: %s", ErrPanic, console.panic())
	case ended != nil:
		return fmt.Errorf("launching: %w", why)
	case err != nil:
		return fmt.Errorf("launching: %s: %w: %w", o.Qemu, err, console.last())
	}
	return nil
}

// guarded refuses to give a ticket, which opens the image, where every user of this
// machine can ask for it: a redirected connection is the guest's, a port of
// 127.0.0.1 is anybody's. refused is why connections are not redirected.
func (o *Options) guarded(refused error) error {
	if o.Image == nil || refused == nil {
		return nil
	}
	return fmt.Errorf("the machine's connections cannot be redirected (%w), and a ticket is not given at a port of 127.0.0.1, where every user of this machine could take the image's key: launch the image without --lazy", refused)
}

// Check says, before there is a kernel or an image, why a machine of that
// kind could not be launched here.
func Check(o Options) error { return o.check() }

// check fills in what does not depend on files, and sees that it can be had.
func (o *Options) check() error {
	if o.Arch == "" {
		o.Arch = hostArch()
	}
	if o.Arch != "x86_64" && o.Arch != "aarch64" {
		return fmt.Errorf("launching: architecture %q is neither x86_64 nor aarch64", o.Arch)
	}
	if o.Qemu == "" {
		o.Qemu = "qemu-system-" + o.Arch
	}
	if _, err := exec.LookPath(o.Qemu); err != nil {
		return fmt.Errorf("launching: %w: install QEMU (on Debian: qemu-system-x86 or qemu-system-arm)", err)
	}
	if o.SSHPort != 0 {
		if err := portIsFree(o.SSHPort); err != nil {
			return fmt.Errorf("launching: port %d for the machine's sshd: %w", o.SSHPort, err)
		}
	}
	if o.Accel == "kvm" && (o.Arch != hostArch() || !kvmWorks()) {
		return fmt.Errorf("launching: KVM does not work here for %s: /dev/kvm is absent, not permitted, or of another architecture", o.Arch)
	}
	return nil
}

func (o *Options) complete() error {
	if err := o.check(); err != nil {
		return err
	}
	for _, f := range []struct{ what, name string }{{"kernel", o.Kernel}, {"initrd", o.Initrd}, {"disk image", o.Disk}} {
		if o.NBD != "" && f.name == "" {
			continue
		}
		if _, err := os.Stat(f.name); err != nil {
			return fmt.Errorf("launching: %s: %w", f.what, err)
		}
	}
	if o.Memory == 0 {
		o.Memory = 1024
	}
	if o.CPUs == 0 {
		o.CPUs = 1
	}
	switch o.Accel {
	case "":
		o.Accel = "tcg"
		if o.Arch == hostArch() && kvmWorks() {
			o.Accel = "kvm"
		}
	case "kvm", "tcg":
	default:
		return fmt.Errorf("launching: accelerator %q is neither kvm nor tcg", o.Accel)
	}
	if o.Console == nil {
		o.Console = io.Discard
	}
	return nil
}

// kvmWorks tells whether KVM can be used: the device alone does not say so
// inside another virtual machine.
func kvmWorks() bool {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	f.Close()
	if hostArch() != "x86_64" {
		return true
	}
	info, err := os.ReadFile("/proc/cpuinfo")
	return err == nil && (bytes.Contains(info, []byte(" vmx")) || bytes.Contains(info, []byte(" svm")))
}

// cmpxchg16b is Linux's number of that instruction (X86_FEATURE_CX16). QEMU's
// emulation of it, of version 7.2 at least, leaves other flags behind than it
// found; Linux 6.12 can be interrupted right there, and dies of it by a double
// fault within a minute. It is told not to use it. Programs still see it.
const cmpxchg16b = "141"

// arguments are QEMU's.
func (o *Options) arguments(base string) []string {
	machine, serial := "q35", "ttyS0"
	if o.Arch == "aarch64" {
		machine, serial = "virt", "ttyAMA0"
	}
	cpu := "max"
	if o.Accel == "kvm" {
		cpu = "host"
	}
	params := []string{"console=" + serial, "quiet", "instar.metadata=" + base, "instar.root=auto", "instar.grow=true"}
	if o.Image != nil {
		// The metadata server is this machine's own, and sees no ports.
		params = append(params, "instar.root=ticket", "instar.anyport", "instar.fail=poweroff")
	}
	if o.User != "" {
		params = append(params, "instar.user="+o.User)
	}
	if o.Accel == "tcg" {
		params = append(params, "instar.patience=5")
		if o.Arch != "aarch64" {
			// On a busy host the emulated timer is late at times, and the
			// kernel's test of it panics.
			params = append(params, "no_timer_check", "clearcpuid="+cmpxchg16b)
		}
	}
	if o.Append != "" {
		params = append(params, o.Append)
	}
	disk := o.Disk
	if o.NBD != "" {
		disk = "nbd:unix:" + o.NBD
	}
	snapshot := "on"
	if o.Keep {
		snapshot = "off"
	}
	return []string{
		"-machine", machine, "-accel", o.Accel, "-cpu", cpu, "-smp", strconv.Itoa(o.CPUs), "-m", strconv.Itoa(o.Memory),
		"-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio",
		"-kernel", o.Kernel, "-initrd", o.Initrd, "-append", strings.Join(params, " "),
		"-drive", "if=none,id=disk,format=raw,discard=unmap,snapshot=" + snapshot + ",file=" + strings.ReplaceAll(disk, ",", ",,"),
		"-device", "virtio-blk-pci,drive=disk",
		"-netdev", fmt.Sprintf("user,id=net,hostfwd=tcp:127.0.0.1:%d-:22", o.SSHPort),
		"-device", "virtio-net-pci,netdev=net,romfile=",
		"-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
	}
}

// metadata is the metadata server for the one instance. Every connection of the
// guest counts as one from 127.0.0.1.
func (o *Options) metadata(images *gateway) (http.Handler, error) {
	in := o.Instance
	m := metadata.Options{}
	if images != nil {
		in.Launch = &metadata.Launch{
			Format: "instar", Store: "s3://" + gatewayBucket, Manifest: chunked.ManifestKey(o.Image.Name, o.Image.Manifest),
			ManifestSHA256: o.Image.Manifest.String(), Signers: o.Image.Signers,
		}
		m.Launcher, m.AnyPort = images, true
	}
	in.Caller = metadata.Caller{Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}
	set, err := metadata.NewSet(&in)
	if err != nil {
		return nil, err
	}
	m.Source = metadata.Static(set)
	return metadata.New(m)
}

// serve serves metadata until ctx ends.
func serve(ctx context.Context, handler http.Handler, l net.Listener) {
	// No connection is looked at: hop limits end at QEMU's router.
	srv := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10}
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		srv.Close()
	})
	srv.Serve(l) // ends when the server is closed
	if !stop() {
		<-closed
	}
}

// portIsFree says why nothing can listen on the port of 127.0.0.1.
func portIsFree(port int) error {
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return err
	}
	return l.Close()
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// awaitSSH waits until something behind the port speaks first, as sshd does.
// QEMU itself accepts connections long before.
func awaitSSH(ctx context.Context, port int) bool {
	for {
		if greets(ctx, port) {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(time.Second):
		}
	}
}

func greets(ctx context.Context, port int) bool {
	d := net.Dialer{Timeout: 10 * time.Second}
	c, err := d.DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return false
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if err := c.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return false
	}
	b := make([]byte, 4)
	_, err = io.ReadFull(c, b)
	return err == nil && string(b) == "SSH-"
}

// lastLines passes on what is written and remembers the end of it, and where
// the kernel panicked.
type lastLines struct {
	w        io.Writer
	panicked func() // called once
	mu       sync.Mutex
	tail     []byte
	reason   string
}

func (l *lastLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	l.tail = append(l.tail, p...)
	first := false
	if l.reason == "" {
		if _, rest, ok := bytes.Cut(l.tail, []byte(panicked)); ok {
			if line, _, ok := bytes.Cut(rest, []byte("\n")); ok {
				l.reason = strings.Trim(string(line), ": \r")
				first = true
			}
		}
	}
	if over := len(l.tail) - 2048; over > 0 {
		l.tail = append(l.tail[:0], l.tail[over:]...)
	}
	l.mu.Unlock()
	if first {
		l.panicked()
	}
	return l.w.Write(p)
}

func (l *lastLines) panic() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.reason
}

func (l *lastLines) last() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := strings.Split(strings.TrimSpace(string(l.tail)), "\n")
	return errors.New(lines[len(lines)-1])
}
