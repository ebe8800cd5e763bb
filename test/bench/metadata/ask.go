package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/instar-image/instar/test/bench/internal/served"
)

func address(i int) net.IP { return net.IPv4(127, 90, byte(i>>8), byte(i)) }

func getRequest(path, token string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token: " + token + "\r\n\r\n"
}

const putRequest = "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token-ttl-seconds: 21600\r\n\r\n"

func newToken(addr string, from net.IP) (string, error) {
	c, err := served.Dial(addr, from)
	if err != nil {
		return "", err
	}
	defer c.Close()
	b, err := c.Ask(putRequest, nil)
	return string(b), err
}

const connections = 32

// hammer repeats a request on 32 connections and returns how many a second
// were answered.
func hammer(addr, request string, d time.Duration) (float64, error) {
	return parallel(d, func(until time.Time) (n int64, err error) {
		c, err := served.Dial(addr, nil)
		if err != nil {
			return 0, err
		}
		defer c.Close()
		buf := make([]byte, 256)
		for time.Now().Before(until) {
			for range 16 {
				if b, err := c.Ask(request, buf); err != nil || string(b) != id {
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
	c, err := served.Dial(addr, address(i))
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
		b, err := c.Ask(a.request, buf)
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
			c, err := served.Dial(addr, from)
			if err != nil {
				errs[w] = err
				return
			}
			defer c.Close()
			request, buf := getRequest("/latest/meta-data/instance-id", token), make([]byte, 256)
			for k := w; k < n; k += connections {
				due := began.Add(time.Duration(k) * time.Second / time.Duration(rate))
				time.Sleep(time.Until(due))
				if _, err := c.Ask(request, buf); err != nil {
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
				c, err := served.Dial(addr, address(instances-1-i%500))
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
