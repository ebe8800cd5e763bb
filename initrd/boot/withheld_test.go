package boot

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/metadata/ticket"
)

// TestWithheld: a store that answers "forbidden" for what is not there, as S3 does
// to who may not list, has a pack looked for where garbage collection put it. A
// metadata server that does not renew proves nothing.
func TestWithheld(t *testing.T) {
	pack, to := chunked.Name{1}, chunked.Name{2}
	object, err := (&chunked.Moved{Packs: []chunked.ObjectSize{{Name: to, Size: 1 << 20}}, Entries: []chunked.MovedChunk{{From: 100, To: 200, Sealed: 50}}}).Encode()
	check(t, err)
	var asked atomic.Int32
	store := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/bucket/"+chunked.MovedKey(pack) {
			w.Write(object)
			return
		}
		asked.Add(1)
		w.WriteHeader(http.StatusForbidden)
	}))
	defer store.Close()
	far := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	tk := ticket.Ticket{
		Version: ticket.Version, InstanceID: "i-1", Format: "instar", Store: "s3://bucket", Endpoint: store.URL, Expires: far,
		Credentials: &ticket.Credentials{AccessKeyID: "a", SecretAccessKey: "b", Expiration: far},
	}
	var dead atomic.Bool
	client := ticketServer(t, func() *ticket.Ticket {
		if dead.Load() {
			return nil
		}
		return &tk
	})
	given := tk
	said := &console{}
	s := &packSource{f: &fetcher{client: http.DefaultClient, stall: time.Minute, say: said.say, access: &access{client: client, t: &given}}}
	p := make([]byte, 50)
	if err := s.ReadPack(t.Context(), pack, 100, p); !errors.Is(err, chunked.ErrMissing) {
		t.Fatalf("%v; it said %q", err, said.lines)
	}
	at, err := s.Moved(t.Context(), chunked.Location{Pack: pack, Offset: 100, Sealed: 50})
	if err != nil || at.Pack != to || at.Offset != 200 {
		t.Fatalf("moved to %v: %v", at, err)
	}
	before := asked.Load()
	if err := s.ReadPack(t.Context(), pack, 100, p); !errors.Is(err, chunked.ErrMissing) || asked.Load() != before {
		t.Errorf("a pack that is known to have moved: %v, after %d requests", err, asked.Load()-before)
	}
	// Another pack is nowhere: that is told, and not remembered.
	other := chunked.Location{Pack: chunked.Name{3}, Offset: 1, Sealed: 1}
	if _, err := s.Moved(t.Context(), other); !errors.Is(err, chunked.ErrNotMoved) {
		t.Errorf("what is nowhere: %v", err)
	}
	dead.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := s.Moved(ctx, other); err == nil || errors.Is(err, chunked.ErrNotMoved) {
		t.Errorf("without a metadata server: %v", err)
	}
}
