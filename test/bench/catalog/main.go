// Command catalog measures the catalog's server over a MinIO: what it takes to
// answer DescribeImages with 100,000 images registered, while nothing changes and
// while somebody changes an image each second, how long the first answers take
// after a start, and how much memory it is in the end. It prints a table with
// targets.
//
//	go run ./test/bench/catalog [-images N] [-seconds N]
//
// It needs the programs that "test/tools go minio" installs, and about 1 GiB below
// $TMPDIR.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	images := flag.Int("images", 100_000, "images that are registered")
	seconds := flag.Int("seconds", 20, "length of each measurement")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	rows, err := bench(ctx, *images, time.Duration(*seconds)*time.Second)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	tw := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "catalog server\tfigure\ttarget\t")
	for _, r := range rows {
		met := ""
		if r.target != "" {
			met = map[bool]string{true: "MET", false: "MISSED"}[r.met]
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", r.what, r.figure, r.target, met)
	}
	tw.Flush()
}

type row struct {
	what, figure, target string
	met                  bool
}

// time99 is a row of times against a limit for their 99th percentile.
func time99(what string, t *times, limit time.Duration) row {
	return row{what, fmt.Sprintf("p99 %s (median %s, %d requests)", ms(t.at(99)), ms(t.at(50)), t.count()), "<= " + ms(limit), t.at(99) <= limit}
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }

func bench(ctx context.Context, images int, long time.Duration) (rows []row, err error) {
	dir, err := os.MkdirTemp("", "instar-bench-catalog-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	program := filepath.Join(dir, "instar")
	build := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", program, "./cmd/instar")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building instar: %w\n%s", err, out)
	}
	store, err := startMinIO(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer store.Stop()
	r, err := fill(ctx, dir, store.Address, images)
	if err != nil {
		return nil, fmt.Errorf("registering %d images: %w", images, err)
	}
	defer r.objects.Close()

	// A start, and the first answers: one image, then all of them.
	begun := time.Now()
	s, err := r.serve(ctx, program, dir, store.Address)
	if err != nil {
		return nil, err
	}
	defer s.Stop()
	c := &client{addr: s.Address}
	if _, err := c.ask(r.byID(0)); err != nil {
		return nil, err
	}
	first := time.Since(begun)
	if _, err := c.ask(r.byFilters()); err != nil {
		return nil, err
	}
	whole := time.Since(begun)
	loaded, _, err := s.Memory()
	if err != nil {
		return nil, err
	}
	what := fmt.Sprintf("%d images: ", images)
	rows = append(rows,
		row{what + "first image shown after a start", ms(first), "<= 1000.0 ms", first <= time.Second},
		row{what + "first search answered after a start, all pages read", ms(whole), "<= 15000.0 ms", whole <= 15*time.Second},
	)
	for _, changing := range []bool{false, true} {
		with := ""
		stop := func() error { return nil }
		if changing {
			with = ", a change each second"
			stop = r.change(ctx)
		}
		byID, err := paced(ctx, s.Address, 100, long, r.byID)
		if err != nil {
			return nil, errors.Join(err, stop())
		}
		two, err := paced(ctx, s.Address, 2, long, func(int) string { return r.byFilters() })
		if err := errors.Join(err, stop()); err != nil {
			return nil, err
		}
		more := []row{
			time99(what+"DescribeImages by id, 100 a second"+with, byID, 20*time.Millisecond),
			time99(fmt.Sprintf("%sby two filters, %d answers, 2 a second%s", what, r.answers, with), two, 200*time.Millisecond),
		}
		for _, m := range more {
			if changing { // for comparison: the targets are for a catalog that rests
				m.target = ""
			}
			rows = append(rows, m)
		}
	}
	now, most, err := s.Memory()
	if err != nil {
		return nil, err
	}
	return append(rows, row{what + "memory of the server: loaded, now, at most", fmt.Sprintf("%.0f, %.0f, %.0f MiB", loaded, now, most), "<= 1024 MiB", most <= 1024}), nil
}
