// Command metadata measures the metadata server: against a bare net/http
// handler that answers a constant, in alternating turns of one run, and with
// 10,000 instances. It prints a table with targets.
//
//	go run ./test/bench/metadata [-turns N] [-turn DURATION] [-requests N] [-only throughput|crowd]
package main

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"text/tabwriter"
	"time"
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
	rows, err := bench(*only, *turns, *turn, *requests)
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

// child is a server process.
type child struct {
	cmd  *exec.Cmd
	addr string
}

func start(addr, program string, args ...string) (*child, error) {
	c := &child{exec.Command(program, args...), addr}
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var log bytes.Buffer
	c.cmd.Stderr = &log
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	for range 600 {
		if conn, err := net.Dial("tcp", addr); err == nil {
			conn.Close()
			return c, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	c.stop()
	return nil, fmt.Errorf("%s did not start: %s", program, log.String())
}

func (c *child) stop() {
	c.cmd.Process.Kill()
	c.cmd.Wait()
}

// rss is the resident memory of the process, now and at most, in MiB.
func (c *child) rss() (now, most float64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
	if err != nil {
		return 0, 0, err
	}
	for name, to := range map[string]*float64{"VmRSS:": &now, "VmHWM:": &most} {
		_, after, _ := strings.Cut(string(b), name)
		kib, err := strconv.Atoi(strings.Fields(after)[0])
		if err != nil {
			return 0, 0, err
		}
		*to = float64(kib) / 1024
	}
	return now, most, nil
}

func bench(only string, turns int, turn time.Duration, requests int) ([]row, error) {
	dir, err := os.MkdirTemp("", "instar-bench")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	instar := filepath.Join(dir, "instar")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", instar, "./cmd/instar")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building instar: %w\n%s", err, out)
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	serve := func(addr, instances string) (*child, error) {
		return start(addr, instar, "metadata", "serve", "--listen", addr, "--instances", instances, "--state", filepath.Join(dir, "state"),
			"--control", "none", "--access-log", filepath.Join(dir, "access.log"), "--rate", "10000000")
	}
	var rows []row
	if only != "crowd" {
		if rows, err = throughput(dir, self, serve, turns, turn); err != nil || only != "" {
			return rows, err
		}
	}
	more, err := crowd(dir, serve, requests)
	return append(rows, more...), err
}

// throughput compares one instance's requests with the constant's.
func throughput(dir, self string, serve func(addr, instances string) (*child, error), turns int, turn time.Duration) ([]row, error) {
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
	defer ours.stop()
	bare, err := start("127.0.0.1:18781", self, "-bare", "127.0.0.1:18781")
	if err != nil {
		return nil, err
	}
	defer bare.stop()
	token, err := newToken(ours.addr, nil)
	if err != nil {
		return nil, err
	}
	get := getRequest("/latest/meta-data/instance-id", token)
	var a, b, ratios, puts []float64
	for range turns {
		for _, side := range []struct {
			to      *child
			request string
			rates   *[]float64
		}{{ours, get, &a}, {bare, get, &b}} {
			rate, err := hammer(side.to.addr, side.request, turn)
			if err != nil {
				return nil, err
			}
			*side.rates = append(*side.rates, rate)
		}
		// One after the other: what else the machine does slows both.
		ratios = append(ratios, a[len(a)-1]/b[len(b)-1])
		rate, err := hammerTokens(ours.addr, turn/3)
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
func crowd(dir string, serve func(addr, instances string) (*child, error), requests int) ([]row, error) {
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
	defer s.stop()
	loaded := time.Since(began)
	wrong, err := visits(s.addr, instances, requests)
	if err != nil {
		return nil, err
	}
	p99, err := paced(s.addr, instances, 2000, 10*time.Second)
	if err != nil {
		return nil, err
	}
	beside, err := besideSlow(s.addr, instances)
	if err != nil {
		return nil, err
	}
	now, most, err := s.rss()
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

func address(i int) net.IP { return net.IPv4(127, 90, byte(i>>8), byte(i)) }

func getRequest(path, token string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token: " + token + "\r\n\r\n"
}

const putRequest = "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token-ttl-seconds: 21600\r\n\r\n"

// client is a connection on which requests are made one after the other, with
// as little work as will do.
type client struct {
	net.Conn
	r *bufio.Reader
}

func dial(addr string, from net.IP) (*client, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from}}
	c, err := d.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	return &client{c, bufio.NewReaderSize(c, 32<<10)}, nil
}

// ask makes a request and returns the body of a 200, in buf if it fits.
func (c *client) ask(request string, buf []byte) ([]byte, error) {
	if _, err := io.WriteString(c.Conn, request); err != nil {
		return nil, err
	}
	length := -1
	for first := true; ; first = false {
		line, err := c.r.ReadSlice('\n')
		if err != nil {
			return nil, err
		}
		switch {
		case first && !bytes.HasPrefix(line, []byte("HTTP/1.1 200 ")):
			return nil, fmt.Errorf("answered %q", line)
		case bytes.HasPrefix(line, []byte("Content-Length: ")):
			if length, err = strconv.Atoi(string(bytes.TrimSpace(line[16:]))); err != nil {
				return nil, err
			}
		case len(line) == 2:
			if length < 0 {
				return nil, errors.New("no length")
			}
			if cap(buf) < length {
				buf = make([]byte, length)
			}
			_, err := io.ReadFull(c.r, buf[:length])
			return buf[:length], err
		}
	}
}

func newToken(addr string, from net.IP) (string, error) {
	c, err := dial(addr, from)
	if err != nil {
		return "", err
	}
	defer c.Close()
	b, err := c.ask(putRequest, nil)
	return string(b), err
}

const connections = 32

// hammer repeats a request on 32 connections and returns how many a second
// were answered.
func hammer(addr, request string, d time.Duration) (float64, error) {
	return parallel(d, func(until time.Time) (n int64, err error) {
		c, err := dial(addr, nil)
		if err != nil {
			return 0, err
		}
		defer c.Close()
		buf := make([]byte, 256)
		for time.Now().Before(until) {
			for range 16 {
				if b, err := c.ask(request, buf); err != nil || string(b) != id {
					return n, fmt.Errorf("got %q: %w", b, err)
				}
				n++
			}
		}
		return n, nil
	})
}

func hammerTokens(addr string, d time.Duration) (float64, error) {
	return parallel(d, func(until time.Time) (n int64, err error) {
		for time.Now().Before(until) {
			if _, err := newToken(addr, nil); err != nil {
				return n, err
			}
			n++
		}
		return n, nil
	})
}

func parallel(d time.Duration, f func(until time.Time) (int64, error)) (float64, error) {
	var total atomic.Int64
	errs := make([]error, connections)
	var wg sync.WaitGroup
	began := time.Now()
	for i := range connections {
		wg.Go(func() {
			n, err := f(began.Add(d))
			total.Add(n)
			errs[i] = err
		})
	}
	wg.Wait()
	return float64(total.Load()) / time.Since(began).Seconds(), errors.Join(errs...)
}

// visits makes the requests evenly as all instances and counts wrong answers.
func visits(addr string, instances, requests int) (int64, error) {
	var wrong atomic.Int64
	var failed atomic.Pointer[error]
	next := make(chan int)
	var wg sync.WaitGroup
	for range connections {
		wg.Go(func() {
			buf := make([]byte, 17000)
			for i := range next {
				bad, err := visit(addr, i, requests/instances, buf)
				wrong.Add(bad)
				if err != nil {
					failed.Store(&err)
				}
			}
		})
	}
	for i := range instances {
		next <- i
	}
	close(next)
	wg.Wait()
	if err := failed.Load(); err != nil {
		return wrong.Load(), *err
	}
	return wrong.Load(), nil
}

func visit(addr string, i, n int, buf []byte) (wrong int64, err error) {
	token, err := newToken(addr, address(i))
	if err != nil {
		return 0, err
	}
	c, err := dial(addr, address(i))
	if err != nil {
		return 0, err
	}
	defer c.Close()
	asked := []struct{ request, want string }{
		{getRequest("/latest/meta-data/instance-id", token), fmt.Sprintf("i-%05d", i)},
		{getRequest("/latest/meta-data/public-keys/0/openssh-key", token), fmt.Sprintf("ssh-ed25519 AAAA%05d", i)},
		{getRequest("/latest/meta-data/local-ipv4", token), address(i).String()},
		{getRequest("/latest/user-data", token), strings.TrimSpace(strings.Repeat(fmt.Sprintf("%05d ", i), 16384/6))},
	}
	for k := range n - 1 {
		a := asked[k%3]
		if k%25 == 24 {
			a = asked[3]
		}
		b, err := c.ask(a.request, buf)
		if err != nil {
			return wrong, err
		}
		if string(b) != a.want {
			wrong++
		}
	}
	return wrong, nil
}

// paced asks at a steady rate as instances in turn and returns the 99th
// percentile of the answers' times, counted from when each was due.
func paced(addr string, instances, rate int, d time.Duration) (time.Duration, error) {
	n := int(d.Seconds()) * rate
	times := make([]time.Duration, n)
	errs := make([]error, connections)
	var wg sync.WaitGroup
	began := time.Now()
	for w := range connections {
		wg.Go(func() {
			from := address(w * (instances / connections))
			token, err := newToken(addr, from)
			if err != nil {
				errs[w] = err
				return
			}
			c, err := dial(addr, from)
			if err != nil {
				errs[w] = err
				return
			}
			defer c.Close()
			request, buf := getRequest("/latest/meta-data/instance-id", token), make([]byte, 256)
			for k := w; k < n; k += connections {
				due := began.Add(time.Duration(k) * time.Second / time.Duration(rate))
				time.Sleep(time.Until(due))
				if _, err := c.ask(request, buf); err != nil {
					errs[w] = err
					return
				}
				times[k] = time.Since(due)
			}
		})
	}
	wg.Wait()
	slices.Sort(times)
	return times[n*99/100], errors.Join(errs...)
}

// besideSlow is paced while 1,000 connections of other instances send a byte of
// a header a second.
func besideSlow(addr string, instances int) (time.Duration, error) {
	stop := make(chan struct{})
	var slow sync.WaitGroup
	var failed atomic.Pointer[error]
	for i := range 1000 {
		slow.Go(func() {
			for {
				c, err := dial(addr, address(instances-1-i%500))
				if err != nil {
					failed.Store(&err)
					return
				}
				for err == nil {
					select {
					case <-stop:
						c.Close()
						return
					case <-time.After(time.Second):
						_, err = io.WriteString(c.Conn, "x") // cut off by and by: then it comes again
					}
				}
				c.Close()
			}
		})
	}
	p99, err := paced(addr, instances, 2000, 10*time.Second)
	close(stop)
	slow.Wait()
	if f := failed.Load(); f != nil && err == nil {
		err = fmt.Errorf("slow connections: %w", *f)
	}
	return p99, err
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
