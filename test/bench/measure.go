package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// cost is what one run took.
type cost struct {
	wall, cpu float64 // seconds
	rss       int64   // bytes, of the largest process
}

// bencher runs both sides in a directory of its own.
type bencher struct {
	ctx    context.Context
	runs   int
	cache  string
	work   string
	instar string
	tree   string   // the Debian tree
	img    string   // a 1 GiB ext4 image of it
	mounts []string // to unmount at the end
}

// The key of the bundles made here, so that the peers' pipe can open them.
const key, iv = "000102030405060708090a0b0c0d0e0f", "0f0e0d0c0b0a09080706050403020100"

// prepare builds the program and makes keys, the tree and the image.
func (b *bencher) prepare() error {
	b.instar = filepath.Join(b.work, "instar")
	build := exec.CommandContext(b.ctx, "go", "build", "-buildvcs=false", "-trimpath", "-ldflags=-s -w", "-o", b.instar, "./cmd/instar")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building instar: %w\n%s", err, out)
	}
	for _, who := range []string{"user", "ec2"} {
		if _, err := b.bash(`openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=bench -keyout $W/` + who + `.key -out $W/` + who + `.crt`); err != nil {
			return err
		}
	}
	if err := b.debian(); err != nil {
		return err
	}
	b.img = filepath.Join(b.work, "disk.img")
	_, err := b.bash(`mke2fs -q -t ext4 -d ` + b.tree + ` $W/disk.img 1G && cat $W/disk.img >/dev/null`)
	return err
}

// debian makes the tree, once, from the mirror this machine's apt uses.
func (b *bencher) debian() error {
	b.tree = filepath.Join(b.cache, "bookworm")
	if _, err := os.Stat(b.tree); err == nil {
		// All of it into the page cache, for both sides alike.
		_, err := b.bash(`tar -c -C ` + b.tree + ` . | cat >/dev/null`)
		return err
	}
	fmt.Fprintln(os.Stderr, "making a Debian tree, once; this takes some minutes")
	_, err := b.bash(`
uris() { apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "$@" | grep debian | grep -v security || true; }
mirror=$(uris 'Origin: Debian' | sed -n 1p)
: "${mirror:=$(uris | sed -n 1p)}"
debootstrap --include=build-essential,ca-certificates,curl,git,locales,man-db,nginx,openssh-server,python3,rsync,vim bookworm ` + b.tree + `.new "$mirror" >&2
rm -f ` + b.tree + `.new/var/cache/apt/archives/*.deb; rm -rf ` + b.tree + `.new/var/lib/apt/lists/*
mv ` + b.tree + `.new ` + b.tree)
	return err
}

// bash runs a pipeline, with W for the work directory, and measures it with all
// its processes.
func (b *bencher) bash(script string) (cost, error) {
	return b.run(exec.CommandContext(b.ctx, "bash", "-euo", "pipefail", "-c", script))
}

// ours runs the program.
func (b *bencher) ours(args ...string) (cost, error) {
	return b.run(exec.CommandContext(b.ctx, b.instar, args...))
}

func (b *bencher) run(cmd *exec.Cmd) (cost, error) {
	cmd.Env = append(os.Environ(), "W="+b.work, "AWS_EC2_METADATA_DISABLED=true")
	// A whole pipeline ends when the benchmark is interrupted.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	var errs strings.Builder
	cmd.Stderr = &errs
	begun := time.Now()
	if err := cmd.Run(); err != nil {
		return cost{}, fmt.Errorf("%.300s: %w\n%.2000s", strings.Join(cmd.Args, " "), err, errs.String())
	}
	wall := time.Since(begun).Seconds()
	usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		return cost{}, errors.New("no resource usage on this system")
	}
	cpu := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return cost{wall: wall, cpu: cpu.Seconds(), rss: usage.Maxrss << 10}, nil
}

// side is one of the two that are compared.
type side struct {
	before string // bash, not measured
	run    func() (cost, error)
}

// duel runs both sides alternately and returns the medians.
func (b *bencher) duel(ours, peer side) (o, p cost, err error) {
	var all [2][]cost
	for range b.runs {
		for i, s := range []side{ours, peer} {
			if _, err := b.bash(s.before); err != nil {
				return o, p, err
			}
			c, err := s.run()
			if err != nil {
				return o, p, err
			}
			all[i] = append(all[i], c)
		}
	}
	return median(all[0]), median(all[1]), nil
}

// median takes the median of each figure.
func median(costs []cost) cost {
	pick := func(f func(cost) float64) float64 {
		v := make([]float64, len(costs))
		for i, c := range costs {
			v[i] = f(c)
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	return cost{
		wall: pick(func(c cost) float64 { return c.wall }), cpu: pick(func(c cost) float64 { return c.cpu }),
		rss: int64(pick(func(c cost) float64 { return float64(c.rss) })),
	}
}

func (c cost) String() string { return fmt.Sprintf("%.2f wall, %.2f CPU", c.wall, c.cpu) }

// bytesIn is the size of all files below a directory.
func bytesIn(dir string) (n int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			n += info.Size()
		}
		return err
	})
	return n, err
}

func (b *bencher) clean() error {
	var errs []error
	for _, m := range b.mounts {
		if err := syscall.Unmount(m, 0); err != nil && !errors.Is(err, syscall.EINVAL) {
			errs = append(errs, fmt.Errorf("unmounting %s: %w", m, err))
		}
	}
	return errors.Join(append(errs, os.RemoveAll(b.work))...)
}
