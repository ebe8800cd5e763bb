package serving_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"github.com/instar-image/instar/internal/serving"
	"github.com/instar-image/instar/test/livelog"
)

// systemd is a notification socket in systemd's place.
func systemd(t *testing.T) (next func() string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return func() string {
		t.Helper()
		if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 4096)
		n, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
}

// listen gives a listener of loopback and the URL of it.
func listen(t *testing.T) (net.Listener, string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln, "http://" + ln.Addr().String()
}

// get asks on a connection of its own.
func get(url string) (int, string, error) {
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := c.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, string(b), err
}

// run runs options, and stops them once; stop waits and gives the error.
func run(t *testing.T, o serving.Options) (stop context.CancelFunc, ended <-chan error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done, ready := make(chan error, 1), make(chan struct{})
	o.Ready = func() { close(ready) }
	go func() { done <- serving.Run(ctx, o) }()
	t.Cleanup(cancel)
	<-ready
	return cancel, done
}

// TestRun: systemd is told in order, what is under way is finished, what waits
// is ended, and nobody else is let in.
func TestRun(t *testing.T) {
	defer goleak.VerifyNone(t)
	next := systemd(t)
	asked, finish := make(chan struct{}), make(chan struct{})
	slow := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(asked)
		<-finish
		if err := r.Context().Err(); err != nil {
			t.Errorf("the request was given up: %v", err)
		}
		fmt.Fprint(w, "finished")
	})
	streaming := make(chan struct{})
	stream := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(streaming)
		<-r.Context().Done()
	})
	a, atA := listen(t)
	b, atB := listen(t)
	stop, ended := run(t, serving.Options{
		Parts: []serving.Part{
			{Server: serving.NewServer(slow, serving.Limits{}, zerolog.Nop()), Listener: a},
			{Server: serving.NewServer(stream, serving.Limits{}, zerolog.Nop()), Listener: b, EndRequests: true},
		},
		Beside:   []func(context.Context) error{func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }},
		Grace:    time.Minute,
		Notifier: serving.NewNotifier(zerolog.Nop()), Status: "serving\nMAINPID=1",
	})
	if got := next(); got != "READY=1\nSTATUS=serving MAINPID=1" {
		t.Errorf("told %q", got)
	}
	answered := make(chan string, 1)
	go func() {
		_, body, err := get(atA)
		answered <- fmt.Sprint(body, err)
	}()
	streamed := make(chan error, 1)
	go func() {
		_, _, err := get(atB)
		streamed <- err
	}()
	<-asked
	<-streaming
	stop()
	if got := next(); got != "STOPPING=1" {
		t.Errorf("told %q", got)
	}
	if err := <-streamed; err != nil {
		t.Errorf("the stream: %v", err)
	}
	for { // until the listener is closed
		c, err := net.Dial("tcp", a.Addr().String())
		if err != nil {
			break
		}
		c.Close()
	}
	select {
	case err := <-ended:
		t.Errorf("ended (%v) with a request under way", err)
	default:
	}
	close(finish)
	if got := <-answered; got != "finished<nil>" {
		t.Errorf("the request under way: %s", got)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestGrace: who takes too long is cut off.
func TestGrace(t *testing.T) {
	defer goleak.VerifyNone(t)
	asked, finish := make(chan struct{}), make(chan struct{})
	ln, at := listen(t)
	stop, ended := run(t, serving.Options{Grace: time.Millisecond, Parts: []serving.Part{{
		Server: serving.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			close(asked)
			<-finish
		}), serving.Limits{}, zerolog.Nop()), Listener: ln,
	}}})
	cut := make(chan error, 1)
	go func() {
		_, _, err := get(at)
		cut <- err
	}()
	<-asked
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := <-cut; err == nil {
		t.Error("a request outlived the grace")
	}
	close(finish)
}

// TestFailure: what fails ends the rest, and is the reason.
func TestFailure(t *testing.T) {
	defer goleak.VerifyNone(t)
	broken := errors.New("the watch broke")
	part := func() serving.Part {
		ln, _ := listen(t)
		return serving.Part{Server: serving.NewServer(http.NotFoundHandler(), serving.Limits{}, zerolog.Nop()), Listener: ln}
	}
	wait := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	err := serving.Run(t.Context(), serving.Options{
		Parts: []serving.Part{part()}, Grace: time.Minute,
		Beside: []func(context.Context) error{wait, func(context.Context) error { return broken }},
	})
	if !errors.Is(err, broken) {
		t.Errorf("something beside failed: %v", err)
	}
	closed := part()
	closed.Listener.Close()
	err = serving.Run(t.Context(), serving.Options{Parts: []serving.Part{part(), closed}, Grace: time.Minute, Beside: []func(context.Context) error{wait}})
	if !errors.Is(err, net.ErrClosed) || !strings.Contains(err.Error(), "serving at 127.0.0.1:") {
		t.Errorf("a listener failed: %v", err)
	}
}

func TestNotifier(t *testing.T) {
	next := systemd(t)
	n := serving.NewNotifier(zerolog.Nop())
	if !n.Told() {
		t.Fatal("nobody is told")
	}
	n.Ready("idle")
	n.Status("idle") // nothing new
	n.Status("web bundling 43%")
	n.Status("web bundling 43%")
	n.Stopping()
	for _, want := range []string{"READY=1\nSTATUS=idle", "STATUS=web bundling 43%", "STOPPING=1"} {
		if got := next(); got != want {
			t.Errorf("told %q, want %q", got, want)
		}
	}
}

// TestNobody: without systemd, and without a Notifier, nothing is told and
// nothing asked.
func TestNobody(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	var nobody *serving.Notifier
	for _, n := range []*serving.Notifier{nobody, serving.NewNotifier(zerolog.Nop())} {
		n.Ready("idle")
		n.Status("busy")
		n.Stopping()
		if err := n.Alive(t.Context(), func(context.Context) error { return errors.New("asked") }); err != nil || n.Told() {
			t.Error(err, n.Told())
		}
	}
}

// TestUntold: what cannot be told is in the log, and no more than that.
func TestUntold(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "none"))
	var l livelog.Log
	serving.NewNotifier(zerolog.New(&l)).Ready("idle")
	if !strings.Contains(l.String(), "telling systemd") {
		t.Errorf("the log: %s", &l)
	}
}

// TestWatchdog: systemd is told that all is well as long as it is, and no
// longer.
func TestWatchdog(t *testing.T) {
	next := systemd(t)
	t.Setenv("WATCHDOG_USEC", "40000")
	var l livelog.Log
	n := serving.NewNotifier(zerolog.New(&l))
	ctx, cancel := context.WithCancel(t.Context())
	checks := 0
	done := make(chan error, 1)
	go func() {
		done <- n.Alive(ctx, func(ctx context.Context) error {
			if checks++; checks <= 2 {
				return nil
			}
			if checks == 5 {
				cancel()
			}
			<-ctx.Done() // it hangs, and is not waited for
			return ctx.Err()
		})
	}()
	for range 2 {
		if got := next(); got != "WATCHDOG=1" {
			t.Errorf("told %q", got)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	n.Stopping()
	if got := next(); got != "STOPPING=1" {
		t.Errorf("told %q after it hung", got)
	}
	if got := strings.Count(l.String(), "is not told that all is well"); got != 2 {
		t.Errorf("it was said %d times that the watchdog is not told: %s", got, &l)
	}
	t.Setenv("WATCHDOG_USEC", "soon")
	if err := n.Alive(t.Context(), nil); err == nil {
		t.Error("a time that is none was taken")
	}
}
