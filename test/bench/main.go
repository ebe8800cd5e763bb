// Command bench measures the program against what operators do without it, in
// one run on one machine, and prints a table of ratios with their targets.
//
//	go run ./test/bench [-runs N] [-only REGEXP] [-dir DIR]
//
// It needs root, the packages test/tools installs, about 8 GiB in DIR, and for
// the rows about memory 4 GiB of RAM. The Debian tree that is captured is made
// once by debootstrap, from the machine's own mirror, and kept in the cache.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	runs := flag.Int("runs", 3, "runs of each side, alternating; medians are compared")
	only := flag.String("only", "", "only the groups whose name matches: bundle, unbundle, vol, memory, create, scale")
	dir := flag.String("dir", "", "where to work (default: beside the cached tree)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := bench(ctx, *runs, *only, *dir); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// row is a line of the table. Its ratio is ours to the peer's, or a plain
// figure where there is no peer.
type row struct {
	what       string
	ours, peer string
	value      float64
	target     float64
	unit       string // "x" for ratios
}

func (r row) met() string {
	if r.value <= r.target {
		return "MET"
	}
	return "MISSED"
}

func bench(ctx context.Context, runs int, only, dir string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root, to mount and to read every file")
	}
	match, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	cache = filepath.Join(cache, "instar", "bench")
	if dir == "" {
		dir = cache
	}
	if err := errors.Join(os.MkdirAll(cache, 0o755), os.MkdirAll(dir, 0o755)); err != nil {
		return err
	}
	work, err := os.MkdirTemp(dir, "work-")
	if err != nil {
		return err
	}
	b := &bencher{ctx: ctx, runs: runs, cache: cache, work: work}
	defer func() { err = errors.Join(err, b.clean()) }()
	if err := b.prepare(); err != nil {
		return err
	}
	begun := time.Now()
	var rows []row
	for _, g := range []struct {
		name string
		run  func() ([]row, error)
	}{
		{"bundle", b.image}, {"unbundle", b.unbundle}, {"vol", b.vol}, {"memory", b.memory}, {"create", b.images}, {"scale", b.scale},
	} {
		if !match.MatchString(g.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "== %s (%s)\n", g.name, time.Since(begun).Round(time.Second))
		more, err := g.run()
		if err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
		rows = append(rows, more...)
	}
	print(rows, runs)
	return nil
}

func print(rows []row, runs int) {
	fmt.Printf("\n%s, %d cores, %s; medians of %d runs, alternating; CPU and wall in seconds\n\n",
		cpuModel(), runtime.NumCPU(), time.Now().UTC().Format(time.DateOnly), runs)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "what\tours\tpeer\tresult\ttarget\t")
	missed := 0
	for _, r := range rows {
		format := func(v float64) string {
			if r.unit == "x" {
				return fmt.Sprintf("%.3fx", v)
			}
			return fmt.Sprintf("%.0f %s", v, r.unit)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t≤ %s\t%s\n", r.what, r.ours, r.peer, format(r.value), format(r.target), r.met())
		if r.met() == "MISSED" {
			missed++
		}
	}
	w.Flush()
	fmt.Printf("\n%d of %d targets met\n", len(rows)-missed, len(rows))
}

func cpuModel() string {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown CPU"
	}
	for line := range strings.Lines(string(data)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown CPU"
}
