package boot

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/instar-image/instar/metadata/ticket"
)

// TestRenewAside: while one object's URL is asked for at a metadata server that does
// not answer, others are found at once; and what that ended with counts for all who
// need a renewal in the next moments, and then no more.
func TestRenewAside(t *testing.T) {
	asked, release := make(chan struct{}, 16), make(chan struct{})
	stalled := make(chan bool, 16)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		select {
		case <-release:
			stalled <- false
		case <-time.After(20 * time.Second): // whom this waits for waits for it
			stalled <- true
		}
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	defer server.Close()
	client, err := ticket.New(server.URL, ticket.Options{AnyPort: true, Timeout: time.Minute})
	check(t, err)
	a := &access{client: client, t: &ticket.Ticket{Objects: map[string]string{"here": "http://store/here"}}}
	gone := make(chan error, 1)
	go func() {
		_, _, err := a.find(t.Context(), "gone")
		gone <- err
	}()
	<-asked
	if _, _, err := a.find(t.Context(), "here"); err != nil {
		t.Error(err)
	}
	close(release)
	if <-stalled {
		t.Error("an object with a URL waits for the metadata server")
	}
	if err := <-gone; !errors.Is(err, errNoURL) || errors.Is(err, errFinal) {
		t.Errorf("without a renewal: %v", err)
	}

	// Nobody else asks for a while.
	if a.again.IsZero() {
		t.Error("a renewal that failed is not remembered")
	}
	a.again = time.Now().Add(time.Hour)
	_, _, again := a.find(t.Context(), "gone")
	if !errors.Is(again, errNoURL) || len(asked) > 0 || !errors.Is(again, a.failed) {
		t.Errorf("a moment later: %v, %d requests", again, len(asked))
	}
	a.again = time.Now()
	if _, _, err := a.find(t.Context(), "gone"); err == nil || len(asked) != 1 {
		t.Errorf("later: %v, %d requests", err, len(asked))
	}

	// Who gave up says nothing of the server.
	a.again = time.Time{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := a.find(ctx, "gone"); err == nil || !a.again.IsZero() {
		t.Errorf("cancelled: %v, remembered until %v", err, a.again)
	}
}
