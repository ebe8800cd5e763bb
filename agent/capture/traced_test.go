package capture_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-image/instar/agent/capture"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/upload/images"
)

// newest opens the newest version.
func (h *host) newest() (*images.Image, *chunked.Stream, *ext4.Layout) {
	h.t.Helper()
	img, err := h.open().Resolve(h.t.Context(), "web-1", images.ResolveOptions{})
	if err != nil {
		h.t.Fatal(err)
	}
	x, err := img.Open(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	d, err := x.Stream(chunked.StreamDisk)
	if err != nil {
		h.t.Fatal(err)
	}
	s, err := x.Stream(chunked.StreamLayout)
	if err != nil {
		h.t.Fatal(err)
	}
	l, err := ext4.ReadLayout(io.NewSectionReader(s.ReaderAt(h.t.Context(), 1<<20), 0, s.Size()))
	if err != nil {
		h.t.Fatal(err)
	}
	return img, d, l
}

// dataOf is where the data of files lie, in the order of the names.
func dataOf(t *testing.T, l *ext4.Layout, names ...string) (ranges []chunked.Range) {
	t.Helper()
	for _, name := range names {
		n := len(ranges)
		for f := range l.Files() {
			if f.Path == name {
				for _, o := range f.Data {
					ranges = append(ranges, chunked.Range{Position: o.Pos, Length: o.Len})
				}
			}
		}
		if len(ranges) == n {
			t.Fatalf("no data of %s", name)
		}
	}
	return ranges
}

// piecesOf counts the pieces of packs that hold ranges, and their bytes.
func piecesOf(t *testing.T, d *chunked.Stream, ranges []chunked.Range) (pieces int, sealed int64) {
	t.Helper()
	seen := map[chunked.Location]bool{}
	var last chunked.Location
	for _, r := range ranges {
		for e, err := range d.Extents(t.Context(), r.Position, r.Position+r.Length) {
			if err != nil {
				t.Fatal(err)
			}
			at := e.Chunk.At
			if seen[at] {
				continue
			}
			seen[at] = true
			if at.Pack != last.Pack || at.Offset != last.Offset+int64(last.Sealed) {
				pieces++
			}
			last = at
			sealed += int64(at.Sealed)
		}
	}
	return pieces, sealed
}

// TestLaidOutByTrace: what a boot reads lies together in the next image, whether
// it is built on the traced one or not; the image is the tree all the same, little
// is stored for it, and it has the trace.
func TestLaidOutByTrace(t *testing.T) {
	h := newHost(t)
	h.capture()
	img, d, l := h.newest()
	names := []string{"usr/bin/small-150", "usr/bin/small-30", "usr/bin/small-199", "usr/bin/small-3", "etc/hostname"}
	ranges := dataOf(t, l, names...)
	large := dataOf(t, l, "usr/bin/large")[0]
	ranges = append(ranges, chunked.Range{Position: large.Position + 2<<20, Length: 64 << 10}, chunked.Range{Position: 0, Length: 8192})
	before, was := piecesOf(t, d, ranges)
	if _, err := img.PutTrace(t.Context(), ranges, h.o.Signer); err != nil {
		t.Fatal(err)
	}
	bytes := int64(0)
	for _, r := range ranges {
		bytes += r.Length
	}

	h.o.BootTrace = "web-1"
	for _, how := range []struct {
		name   string
		full   bool
		change string
	}{{"on the traced image", false, ""}, {"with a file changed", false, "usr/bin/small-30"}, {"from nothing", true, "usr/bin/small-31"}} {
		if how.change != "" {
			if err := os.WriteFile(filepath.Join(h.tree, how.change), []byte(strings.Repeat("a new one, ", 400)), 0o755); err != nil {
				t.Fatal(err)
			}
			h.settle()
		}
		h.o.Full = how.full
		res := h.capture()
		if res.Traced == 0 || !how.full && res.BytesAdded > bytes+400<<10 {
			t.Errorf("%s: %d bytes are traced, %d stored for %d", how.name, res.Traced, res.BytesAdded, bytes)
		}
		img, d, l := h.newest()
		trace, err := img.Trace(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if first := dataOf(t, l, names[0])[0]; trace.Ranges[0].Position != first.Position {
			t.Errorf("%s: the trace begins at %d, %s is at %d", how.name, trace.Ranges[0].Position, names[0], first.Position)
		}
		after, now := piecesOf(t, d, trace.Ranges)
		if after > 2 || now > was/2 {
			t.Errorf("%s: a boot reads %d bytes in %d pieces, before %d in %d", how.name, now, after, was, before)
		}
	}

	h.o.BootTrace = "nobody"
	h.o.Store = h.open()
	if _, err := capture.CreateImage(t.Context(), h.o, &quiet{}); !errors.Is(err, images.ErrNoImage) {
		t.Errorf("by the trace of nobody: %v", err)
	}
	if err := img.DeleteTrace(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.o.BootTrace = "web-1@" + img.Name.String()
	if _, err := capture.CreateImage(t.Context(), h.o, &quiet{}); !errors.Is(err, images.ErrNoTrace) {
		t.Errorf("by a trace that is not there: %v", err)
	}
}
