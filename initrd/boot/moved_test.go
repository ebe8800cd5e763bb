package boot

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/initrd/eager"
	"github.com/instar-image/instar/metadata/ticket"
)

// ticketServer gives the tickets that give returns; nil: none.
func ticketServer(t *testing.T, give func() *ticket.Ticket) *ticket.Client {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60")
			w.Write([]byte("token"))
			return
		}
		tk := give()
		if tk == nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
			return
		}
		_, to, err := ticket.ParseRequest(body)
		if err != nil {
			t.Error(err)
			return
		}
		sealed, err := tk.Seal(to)
		if err != nil {
			t.Error(err)
			return
		}
		w.Write(sealed)
	}))
	t.Cleanup(server.Close)
	client, err := ticket.New(server.URL, ticket.Options{AnyPort: true, Timeout: time.Minute})
	check(t, err)
	return client
}

// repack puts the chunks of each of the image's packs into another pack, as
// garbage collection does, and deletes it. What was put is told.
func (s *instarStore) repack(t *testing.T, img *instarImage, hop byte) (put []string) {
	t.Helper()
	moved := make(map[chunked.Name]*chunked.Moved)
	for e, err := range img.stream.Extents(t.Context(), 0, img.stream.Size()) {
		check(t, err)
		at := e.Chunk.At
		// A former hop's packs have the chunks where they were.
		n := at.Pack
		for range hop {
			data, err := os.ReadFile(filepath.Join(s.dir, chunked.MovedKey(n)))
			check(t, err)
			m, err := chunked.DecodeMoved(n, data)
			check(t, err)
			n = m.Packs[0].Name
		}
		if moved[n] == nil {
			data, err := os.ReadFile(filepath.Join(s.dir, chunked.PackKey(n)))
			check(t, err)
			data = append(data, bytes.Repeat([]byte{hop + 1}, 64)...)
			to := chunked.ObjectSize{Name: chunked.NameOf(data), Size: int64(len(data))}
			moved[n] = &chunked.Moved{Packs: []chunked.ObjectSize{to}}
			put = append(put, s.put(t, chunked.PackKey(to.Name), data))
		}
		m := moved[n]
		m.Entries = append(m.Entries, chunked.MovedChunk{From: at.Offset, To: at.Offset, Sealed: int32(at.Sealed)})
	}
	for n, m := range moved {
		slices.SortFunc(m.Entries, func(a, b chunked.MovedChunk) int { return cmp.Compare(a.From, b.From) })
		m.Entries = slices.Compact(m.Entries)
		data, err := m.Encode()
		check(t, err)
		put = append(put, s.put(t, chunked.MovedKey(n), data))
		check(t, os.Remove(filepath.Join(s.dir, chunked.PackKey(n))))
	}
	return put
}

func (s *instarStore) put(t *testing.T, key string, data []byte) string {
	t.Helper()
	name := filepath.Join(s.dir, key)
	check(t, os.MkdirAll(filepath.Dir(name), 0o755))
	check(t, os.WriteFile(name, data, 0o644))
	return key
}

// TestMovedByURL: packs are repacked, twice, and deleted after the instance has its
// ticket of presigned URLs. It asks for another, which has the URLs of what became of
// them. A server that gives none is named, with the way out.
func TestMovedByURL(t *testing.T) {
	s := newInstarStore(t)
	packs := 0
	for key := range s.ticket.Objects {
		if strings.HasPrefix(key, chunked.PacksFolder) {
			packs++
		}
	}
	base := strings.TrimSuffix(s.ticket.Objects[s.ticket.Manifest], s.ticket.Manifest)
	fresh := s.ticket
	claims := 0
	client := ticketServer(t, func() *ticket.Ticket {
		claims++
		return &fresh
	})
	given := s.ticket
	said := &console{}
	open := func() *instarImage {
		img, err := openTicket(t.Context(), &given, "i-1", filepath.Join(s.dir, "signers"), &fetcher{
			client: http.DefaultClient, stall: time.Minute, access: &access{t: &given, client: client}, say: said.say,
		})
		check(t, err)
		return img.(*instarImage)
	}
	img := open()
	with := make(map[string]string)
	for key, u := range s.ticket.Objects {
		with[key] = u
	}
	for hop := range byte(2) {
		for _, key := range s.repack(t, img, hop) {
			with[key] = base + key
		}
	}

	// The server does not know what became of them.
	disk := usedDisk(t, len(s.image))
	err := eager.Write(t.Context(), eager.Device(disk, int64(len(s.image))), img.identity("i-1"), img)
	if !errors.Is(err, chunked.ErrMissing) {
		t.Errorf("without URLs: %v", err)
	}
	if all := strings.Join(said.lines, "\n"); !strings.Contains(all, "launch.credentials.sts") || claims == 0 || claims > packs {
		t.Errorf("without URLs: %d claims for %d packs, said %q", claims, packs, all)
	}

	fresh.Objects, claims, said.lines = with, 0, nil
	img = open()
	check(t, eager.Write(t.Context(), eager.Device(disk, int64(len(s.image))), img.identity("i-1"), img))
	got := make([]byte, len(s.image))
	if _, err := disk.ReadAt(got, 0); err != nil || !bytes.Equal(got, s.image) {
		t.Errorf("the disk is not the image: %v", err)
	}
	if claims != 1 {
		t.Errorf("%d claims, said %q", claims, said.lines)
	}
}
