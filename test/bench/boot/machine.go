package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/ticket"
)

// limit ends a machine that hangs.
const limit = 20 * time.Minute

// direct boots the instance's disk by Debian's initrd.
func (b *bencher) direct(ctx context.Context) (result, error) {
	return b.boot(ctx, b.debian, "root=LABEL=root ro", "file="+b.disk+",snapshot=on", nil)
}

// local boots the image from the disk by Instar's initrd, as a new instance.
func (b *bencher) local(ctx context.Context) (result, error) {
	c, err := b.cloud()
	if err != nil {
		return result{}, err
	}
	defer c.close()
	return b.boot(ctx, b.ours, c.params()+" instar.root=auto", "file="+b.image+",snapshot=on", c)
}

// ticket boots an empty disk by Instar's initrd, which fetches the image.
func (b *bencher) ticket(ctx context.Context) (result, error) {
	c, err := b.cloud()
	if err != nil {
		return result{}, err
	}
	defer c.close()
	st, err := os.Stat(b.image)
	if err != nil {
		return result{}, err
	}
	blank := filepath.Join(b.dir, "blank")
	if err := os.WriteFile(blank, nil, 0o600); err != nil {
		return result{}, err
	}
	defer os.Remove(blank)
	if err := os.Truncate(blank, st.Size()); err != nil {
		return result{}, err
	}
	return b.boot(ctx, b.ours, c.params()+" instar.root=ticket instar.anyport", "file="+blank, c)
}

// watch notes when the console shows a point for the first time.
type watch struct {
	mu    sync.Mutex
	text  []byte
	now   func() cost
	found map[string]cost
}

// marks are what the console shows at a point, whichever initrd it is.
var marks = []struct{ point, text string }{
	{"init", "Run /init as init process"},
	{"lease", "network: eth0"},
	{"root", "EXT4-fs (vda): mounted filesystem"},
	{"system", "running in system mode"},
}

func (w *watch) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text = append(w.text, p...)
	for _, m := range marks {
		if _, ok := w.found[m.point]; !ok && bytes.Contains(w.text, []byte(m.text)) {
			w.found[m.point] = w.now()
		}
	}
	return len(p), nil
}

func (b *bencher) boot(ctx context.Context, initrd, params, drive string, c *cloud) (result, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return result{}, err
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "1024",
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio", "-kernel", b.kernel, "-initrd", initrd,
		"-append", "console=ttyS0 loglevel=7 panic=-1 no_timer_check "+params,
		"-drive", "if=none,id=disk,format=raw,cache=unsafe,"+drive, "-device", "virtio-blk-pci,drive=disk",
		"-netdev", fmt.Sprintf("user,id=net,hostfwd=tcp:127.0.0.1:%d-:22", port), "-device", "virtio-net-pci,netdev=net,romfile=",
		"-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng")
	begun := time.Now()
	w := &watch{found: make(map[string]cost)}
	w.now = func() cost { return cost{time.Since(begun).Seconds(), cpuOf(cmd.Process.Pid)} }
	cmd.Stdout, cmd.Stderr = w, w
	w.mu.Lock() // until the process is known
	err = cmd.Start()
	w.mu.Unlock()
	if err != nil {
		return result{}, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer func() {
		cancel()
		<-ended
	}()
	for !greets(port) {
		select {
		case err := <-ended:
			ended <- err
			return result{}, fmt.Errorf("the machine ended (%v):\n%s", err, w.tail())
		case <-time.After(100 * time.Millisecond):
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.found["sshd"] = w.now()
	r := result{at: w.found}
	if c != nil {
		r.fetched = c.fetched.Load()
	}
	return r, nil
}

func (w *watch) tail() []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text[max(0, len(w.text)-2000):]
}

// greets tells whether sshd answers: QEMU accepts connections long before.
func greets(port int) bool {
	c, err := net.DialTimeout("tcp", "127.0.0.1:"+strconv.Itoa(port), time.Second)
	if err != nil {
		return false
	}
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(2 * time.Second))
	b := make([]byte, 4)
	_, err = io.ReadFull(c, b)
	return err == nil && string(b) == "SSH-"
}

// cpuOf is the CPU time that a process has used, in seconds (proc(5), stat).
func cpuOf(pid int) float64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100 // USER_HZ
}

// cloud is a metadata server that gives tickets, and the store they lead to.
type cloud struct {
	b       *bencher
	server  *http.Server
	meta    *http.Server
	store   int // port
	port    int
	fetched atomic.Int64
}

func (b *bencher) cloud() (*cloud, error) {
	c := &cloud{b: b}
	cert, err := os.ReadFile(filepath.Join(b.dir, "user.crt"))
	if err != nil {
		return nil, err
	}
	set, err := metadata.NewSet(&metadata.Instance{
		ID: "i-bench", Hostname: "bench", Caller: metadata.Caller{Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}},
		Launch: &metadata.Launch{Format: "ec2", Store: "s3://bucket", Manifest: "bench.manifest.xml", Certificate: string(cert)},
	})
	if err != nil {
		return nil, err
	}
	h, err := metadata.New(metadata.Options{Source: metadata.Static(set), Launcher: c, AnyPort: true})
	if err != nil {
		return nil, err
	}
	files := http.FileServer(http.Dir(b.bundle))
	c.server, c.store, err = listen(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		files.ServeHTTP(&counter{w, &c.fetched}, r)
	}))
	if err != nil {
		return nil, err
	}
	if c.meta, c.port, err = listen(h); err != nil {
		c.server.Close()
	}
	return c, err
}

func listen(h http.Handler) (*http.Server, int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, 0, err
	}
	s := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	go s.Serve(l)
	return s, l.Addr().(*net.TCPAddr).Port, nil
}

func (c *cloud) close() {
	c.server.Close()
	c.meta.Close()
}

// params lead the initrd here; the patience is for a machine that is emulated.
func (c *cloud) params() string {
	return fmt.Sprintf("instar.patience=10 instar.metadata=http://10.0.2.2:%d", c.port)
}

// Claim seals a ticket for the bundle.
func (c *cloud) Claim(_ context.Context, in *metadata.Instance, body []byte) ([]byte, error) {
	_, to, err := ticket.ParseRequest(body)
	if err != nil {
		return nil, err
	}
	manifest, err := os.ReadFile(filepath.Join(c.b.bundle, "bench.manifest.xml"))
	if err != nil {
		return nil, err
	}
	names, err := filepath.Glob(filepath.Join(c.b.bundle, "bench.part.*"))
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(manifest)
	t := ticket.Ticket{
		Version: ticket.Version, InstanceID: in.ID, Format: "ec2", Store: in.Launch.Store, Manifest: in.Launch.Manifest, ManifestBytes: manifest,
		ManifestSHA256: hex.EncodeToString(sum[:]), Certificate: in.Launch.Certificate, Key: key, IV: iv, Objects: make(map[string]string),
		Expires: time.Now().Add(time.Hour),
	}
	for _, n := range names {
		t.Objects[filepath.Base(n)] = fmt.Sprintf("http://10.0.2.2:%d/%s", c.store, filepath.Base(n))
	}
	return t.Seal(to)
}

// Complete has nothing to withdraw.
func (c *cloud) Complete(context.Context, *metadata.Instance, []byte) error { return nil }

// counter counts the bytes of answers.
type counter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.n.Add(int64(n))
	return n, err
}
