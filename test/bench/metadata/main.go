// Command metadata measures the metadata server: against a bare net/http
// handler that answers a constant, in alternating turns of one run, and with
// 10,000 instances. It prints a table with targets.
//
//	go run ./test/bench/metadata [-turns N] [-turn DURATION] [-requests N] [-only throughput|crowd]
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/instar-image/instar/test/bench/internal/served"
)

func main() {
	turns := flag.Int("turns", 15, "turns of each side; the median of each pair's ratio counts")
	turn := flag.Duration("turn", time.Second, "length of a turn")
	only := flag.String("only", "", "measure `PART` alone: throughput or crowd")
	requests := flag.Int("requests", 1_000_000, "requests of the 10,000 instances")
	bare := flag.String("bare", "", "(internal) serve a constant at this address")
	flag.Parse()
	if *bare != "" {
		fmt.Fprintln(os.Stderr, serveConstant(*bare))
		os.Exit(1)
	}
	rows, err := bench(context.Background(), *only, *turns, *turn, *requests)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	tw := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "metadata server\tfigure\ttarget\t")
	for _, r := range rows {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", r.what, r.figure, r.target, map[bool]string{true: "MET", false: "MISSED"}[r.met])
	}
	tw.Flush()
}

type row struct {
	what, figure, target string
	met                  bool
}

const id = "i-0abc1234def567890"

// serveConstant is the least that net/http can do.
func serveConstant(addr string) error {
	return (&http.Server{Addr: addr, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Type"] = []string{"text/plain"}
		io.WriteString(w, id)
	})}).ListenAndServe()
}

func bench(ctx context.Context, only string, turns int, turn time.Duration, requests int) ([]row, error) {
	dir, err := os.MkdirTemp("", "instar-bench")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	instar := filepath.Join(dir, "instar")
	build := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", instar, "./cmd/instar")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building instar: %w\n%s", err, out)
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	serve := func(addr, instances string) (*served.Server, error) {
		return served.Start(ctx, addr, filepath.Join(dir, "server.log"), nil, instar, "metadata", "serve", "--listen", addr, "--instances", instances, "--state", filepath.Join(dir, "state"),
			"--control", "none", "--access-log", filepath.Join(dir, "access.log"), "--rate", "10000000")
	}
	var rows []row
	if only != "crowd" {
		if rows, err = throughput(ctx, dir, self, serve, turns, turn); err != nil || only != "" {
			return rows, err
		}
	}
	more, err := crowd(dir, serve, requests)
	return append(rows, more...), err
}

// throughput compares one instance's requests with the constant's.
func throughput(ctx context.Context, dir, self string, serve func(addr, instances string) (*served.Server, error), turns int, turn time.Duration) ([]row, error) {
	one := filepath.Join(dir, "one")
	if err := os.Mkdir(one, 0o700); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(one, "a.yaml"), []byte("instance-id: "+id+"\ncaller: {addresses: [127.0.0.1]}\nmetadata-options: {http-tokens: required}\n"), 0o600); err != nil {
		return nil, err
	}
	ours, err := serve("127.0.0.1:18780", one)
	if err != nil {
		return nil, err
	}
	defer ours.Stop()
	bare, err := served.Start(ctx, "127.0.0.1:18781", filepath.Join(dir, "bare.log"), nil, self, "-bare", "127.0.0.1:18781")
	if err != nil {
		return nil, err
	}
	defer bare.Stop()
	token, err := newToken(ours.Address, nil)
	if err != nil {
		return nil, err
	}
	get := getRequest("/latest/meta-data/instance-id", token)
	var a, b, ratios, puts []float64
	for range turns {
		for _, side := range []struct {
			to      *served.Server
			request string
			rates   *[]float64
		}{{ours, get, &a}, {bare, get, &b}} {
			rate, err := hammer(side.to.Address, side.request, turn)
			if err != nil {
				return nil, err
			}
			*side.rates = append(*side.rates, rate)
		}
		// One after the other: what else the machine does slows both.
		ratios = append(ratios, a[len(a)-1]/b[len(b)-1])
		rate, err := hammerTokens(ours.Address, turn/3)
		if err != nil {
			return nil, err
		}
		puts = append(puts, rate)
	}
	ratio := median(ratios)
	return []row{
		{"GET with a token, against a constant from net/http", fmt.Sprintf("%.0f/s against %.0f/s: %.2fx", median(a), median(b), ratio), ">= 0.85x", ratio >= 0.85},
		{"PUT token, a connection each", fmt.Sprintf("%.0f/s", median(puts)), ">= 2000/s", median(puts) >= 2000},
	}, nil
}

// crowd asks as 10,000 instances, each with 16 KiB of user data.
func crowd(dir string, serve func(addr, instances string) (*served.Server, error), requests int) ([]row, error) {
	const instances = 10_000
	many := filepath.Join(dir, "many")
	if err := os.Mkdir(many, 0o700); err != nil {
		return nil, err
	}
	for i := range instances {
		text := fmt.Sprintf("instance-id: i-%05d\ncaller: {addresses: [%s]}\nami-id: ami-1\ninterfaces: [{mac: '02:00:00:00:%02x:%02x', local-ipv4s: [%s]}]\npublic-keys: [{name: k, key: ssh-ed25519 AAAA%05d}]\nuser-data: %s\n",
			i, address(i), i>>8, i&255, address(i), i, strings.Repeat(fmt.Sprintf("%05d ", i), 16384/6))
		if err := os.WriteFile(filepath.Join(many, fmt.Sprintf("%05d.yaml", i)), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	began := time.Now()
	s, err := serve("127.0.0.1:18782", many)
	if err != nil {
		return nil, err
	}
	defer s.Stop()
	loaded := time.Since(began)
	wrong, err := visits(s.Address, instances, requests)
	if err != nil {
		return nil, err
	}
	p99, err := paced(s.Address, instances, 2000, 10*time.Second)
	if err != nil {
		return nil, err
	}
	beside, err := besideSlow(s.Address, instances)
	if err != nil {
		return nil, err
	}
	now, most, err := s.Memory()
	if err != nil {
		return nil, err
	}
	return []row{
		{"10,000 instances: read and ready", fmt.Sprintf("%.1f s", loaded.Seconds()), "<= 15 s", loaded <= 15*time.Second},
		{fmt.Sprintf("10,000 instances: wrong answers in %d requests", requests), fmt.Sprint(wrong), "0", wrong == 0},
		{"10,000 instances: p99 at 2,000 requests a second", fmt.Sprintf("%.1f ms", float64(p99.Microseconds())/1000), "<= 20 ms", p99 <= 20*time.Millisecond},
		{"10,000 instances: the same beside 1,000 connections of a byte a second", fmt.Sprintf("%.1f ms", float64(beside.Microseconds())/1000), "<= 50 ms", beside <= 50*time.Millisecond},
		{"10,000 instances: resident memory, now and at most", fmt.Sprintf("%.0f MiB, %.0f MiB", now, most), "<= 300 MiB", most <= 300},
	}, nil
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
