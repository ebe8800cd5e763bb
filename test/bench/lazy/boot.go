package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/initrd/launch"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/ticket"
)

// limit ends a machine that hangs.
const limit = 30 * time.Minute

// point is what was spent when a boot passed it.
type point struct {
	wall, cpu float64 // seconds
	traffic
}

// points of a boot, in their order.
var points = []string{"init", "root", "sshd", "complete"}

// marks are what the console shows at them. sshd answers by itself.
var marks = map[string]string{
	"init":     "instar: [",
	"root":     "switching to the image's",
	"complete": "all of the image is on the disk",
}

// result is what a boot took.
type result struct {
	at     map[string]point
	demand int // fetches somebody waited for, until all was there; -1: unknown
}

// console notes when it shows a mark for the first time.
type console struct {
	mu    sync.Mutex
	text  []byte
	now   func() point
	found map[string]point
	seen  map[string]chan struct{}
}

func newConsole(now func() point) *console {
	c := &console{now: now, found: map[string]point{}, seen: map[string]chan struct{}{}}
	for name := range marks {
		c.seen[name] = make(chan struct{})
	}
	return c
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.text = append(c.text, p...)
	for name, text := range marks {
		if _, ok := c.found[name]; !ok && bytes.Contains(c.text, []byte(text)) {
			c.found[name] = c.now()
			close(c.seen[name])
		}
	}
	return len(p), nil
}

func (c *console) tail() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.text[max(0, len(c.text)-3000):])
}

// boot boots the image as kind says, with the store behind a line, until sshd
// answers and, if the machine fetches its disk itself, all of that is there.
func (b *bencher) boot(ctx context.Context, k kind, l line) (result, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	f := &far{Store: b.objects, line: &pacing{line: l}}
	begun := time.Now()
	now := func() point { return point{time.Since(begun).Seconds(), guestCPU(), f.traffic()} }
	c := newConsole(now)
	in := metadata.Instance{ID: "i-bench", Hostname: "bench", Placement: metadata.Placement{Zone: "local-1a"}}
	o := launch.Options{
		Kernel: b.kernel, Initrd: b.initrd, Instance: in, Accel: "tcg", Memory: 1024, Console: c, Append: "loglevel=7 systemd.log_target=kmsg",
	}
	img := b.plain
	if k.traced {
		img = b.traced
	} else {
		f.none = chunked.TraceKey(img.image.Manifest.Name, img.image.Name) // of the version that is booted without
	}
	if k.mode == "" {
		o.Disk = b.local
	} else {
		key, err := img.image.IndexKey(ctx)
		if err != nil {
			return result{}, err
		}
		o.Image = &launch.Image{
			Objects: f, Name: img.image.Manifest.Name, Manifest: img.image.Name, Root: img.image.Manifest.Index.Root.Name, Key: key,
			Signers: b.signers, Mode: k.mode,
		}
		o.Disk, o.Keep = filepath.Join(b.dir, "blank"), true
		if err := errors.Join(os.WriteFile(o.Disk, nil, 0o600), os.Truncate(o.Disk, img.room())); err != nil {
			return result{}, err
		}
		defer os.Remove(o.Disk)
	}
	up := make(chan struct{})
	var once sync.Once
	o.Ready = func(m launch.Machine) {
		if m.SSH {
			once.Do(func() {
				c.mu.Lock()
				defer c.mu.Unlock()
				c.found["sshd"] = now()
				close(up)
			})
		}
	}
	running, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- launch.Run(running, o) }()
	defer func() {
		stop()
		<-ended
	}()
	wait := func(what string, ch <-chan struct{}) error {
		select {
		case <-ch:
			return nil
		case err := <-ended:
			ended <- err
			return fmt.Errorf("%s: the machine ended before %s (%w):\n%s", k.name, what, err, c.tail())
		}
	}
	if err := wait("sshd answered", up); err != nil {
		return result{}, err
	}
	if k.mode == ticket.Lazy {
		if err := wait("all of its disk was there", c.seen["complete"]); err != nil {
			return result{}, err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	r := result{at: c.found, demand: -1}
	if m := regexp.MustCompile(`(\d+) reads waited for a fetch`).FindSubmatch(c.text); m != nil {
		if n, err := strconv.Atoi(string(m[1])); err == nil {
			r.demand = n
		}
	}
	return r, nil
}

// guestCPU is the CPU time of the machine that is this process's child, in
// seconds (proc(5), stat).
func guestCPU() (seconds float64) {
	names, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0
	}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil || !bytes.Contains(data, []byte("(qemu-system-x86")) {
			continue
		}
		f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
		if len(f) < 13 || f[1] != strconv.Itoa(os.Getpid()) {
			continue
		}
		user, _ := strconv.ParseFloat(f[11], 64)
		system, _ := strconv.ParseFloat(f[12], 64)
		seconds += (user + system) / 100 // USER_HZ
	}
	return seconds
}
