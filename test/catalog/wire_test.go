package catalog

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/s3fault"
)

// wire is what lies between one server and the store: connections are cut,
// answers lost, requests arrive late, and at some of them the server is killed.
// It knows when each connection ended, so that it can be said after which moment
// nothing of a server that is dead can reach the store any more.
type wire struct {
	url   string
	front *httptest.Server
	proxy *s3fault.Proxy
	since func() int64
	kill  func()

	mu     sync.Mutex
	r      *rand.Rand
	calm   bool
	cut    int              // connections yet to be refused
	ended  []int64          // of each connection, 0 while it is open
	number map[net.Conn]int // of connections that are open
	counts map[string]int
}

// Of so many requests, one. Those that decide, which replace the head, are few.
const (
	oddsFault = 40
	oddsLate  = 15
	oddsCut   = 250
	oddsKill  = 200
	oddsHead  = 18 // is killed at
)

// wireFaults are those that a client outlives by asking again.
var wireFaults = []s3fault.Fault{
	s3fault.Status500, s3fault.SlowDown, s3fault.HTML502, s3fault.ResetFirst, s3fault.ResetRequest, s3fault.LostReply, s3fault.LostReply,
	s3fault.ResetHeaders, s3fault.ResetBody, s3fault.Truncated, s3fault.Applied500, s3fault.Applied500, s3fault.AppliedHTML,
}

type connectionNumber struct{}

func newWire(t *testing.T, target string, seed uint64, since func() int64) *wire {
	w := &wire{proxy: s3fault.New(target), since: since, r: rand.New(rand.NewPCG(seed, 0x77697265)), number: map[net.Conn]int{}, counts: map[string]int{}}
	w.proxy.Plan(func(s3fault.Request) s3fault.Fault {
		w.mu.Lock()
		defer w.mu.Unlock()
		switch {
		case w.calm:
		case w.cut > 0:
			w.cut--
			return s3fault.ResetFirst
		case w.r.IntN(oddsFault) == 0:
			w.counts["faults"]++
			return wireFaults[w.r.IntN(len(wireFaults))]
		}
		return s3fault.None
	})
	w.front = httptest.NewUnstartedServer(w)
	// Called in the order in which connections are taken in.
	w.front.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.ended = append(w.ended, 0)
		w.number[c] = len(w.ended) - 1
		return context.WithValue(ctx, connectionNumber{}, len(w.ended)-1)
	}
	w.front.Config.ConnState = func(c net.Conn, s http.ConnState) {
		if s != http.StateClosed && s != http.StateHijacked {
			return
		}
		w.mu.Lock()
		n, ok := w.number[c]
		delete(w.number, c)
		w.mu.Unlock()
		if ok && s == http.StateClosed { // of others ServeHTTP says when they end
			w.end(n)
		}
	}
	w.front.Start()
	w.url = w.front.URL
	t.Cleanup(func() {
		w.front.CloseClientConnections()
		w.front.Close()
		w.proxy.Close()
	})
	return w
}

// ServeHTTP passes one request on, the only one of its connection.
func (w *wire) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	number := r.Context().Value(connectionNumber{}).(int)
	if r.URL.Path == "/mark" {
		rw.Header().Set("Connection", "close")
		fmt.Fprint(rw, number)
		return
	}
	defer w.end(number)
	w.mu.Lock()
	late, fate := time.Duration(0), ""
	if !w.calm {
		if w.r.IntN(oddsLate) == 0 {
			late = time.Duration(w.r.IntN(60)+1) * time.Millisecond
			w.counts["late"]++
		}
		if w.r.IntN(oddsCut) == 0 {
			w.cut = 2 + w.r.IntN(3)
			w.counts["partitions"]++
		}
		odds := oddsKill
		if r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, "/"+catalog.HeadKey) {
			odds = oddsHead
		}
		if w.r.IntN(odds) == 0 {
			fate = []string{"before", "amid", "after"}[w.r.IntN(3)]
			w.counts["kills at a request"]++
		}
	}
	w.mu.Unlock()
	switch fate {
	case "before": // nothing reaches the store
		w.kill()
		return
	case "amid": // the request does, perhaps when another server runs in its place
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		w.kill()
		late = max(late, time.Duration(number%5)*50*time.Millisecond)
	case "after":
		defer w.kill()
	}
	time.Sleep(late)
	w.proxy.ServeHTTP(rw, r)
}

func (w *wire) end(number int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended[number] = w.since()
}

// mark is a number above those of all connections made before.
func (w *wire) mark(ctx context.Context) (int, error) {
	r, err := http.NewRequestWithContext(ctx, "GET", w.url+"/mark", nil)
	if err != nil {
		return 0, err
	}
	r.Close = true
	res, err := (&http.Transport{Proxy: nil, DisableKeepAlives: true}).RoundTrip(r)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(string(b))
}

// quiet ends the faults, and waits for what is under way. The server is dead.
func (w *wire) quiet(ctx context.Context) error {
	w.mu.Lock()
	w.calm = true
	w.mu.Unlock()
	// Whatever was connected before the mark has been taken in by then.
	if _, err := w.mark(ctx); err != nil {
		return err
	}
	for { // connections that never carried a request end with the server
		w.mu.Lock()
		open := 0
		for _, at := range w.ended {
			if at == 0 {
				open++
			}
		}
		w.mu.Unlock()
		if open == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d connections are still open: %w", open, context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// over is when the last of the connections below mark had ended.
func (w *wire) over(mark int) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	var last int64
	for _, at := range w.ended[:min(mark, len(w.ended))] {
		last = max(last, at)
	}
	return last
}
