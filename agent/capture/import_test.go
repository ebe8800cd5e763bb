package capture_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/instar-image/instar/agent/capture"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/sparse"
	"github.com/instar-image/instar/upload/images"
)

// importer imports disks into a store of its own.
type importer struct {
	*host
	o capture.ImportOptions
}

func newImporter(t *testing.T) *importer {
	t.Helper()
	h := &host{t: t, tree: t.TempDir(), dir: t.TempDir()}
	h.login()
	return &importer{h, capture.ImportOptions{
		Store: h.open(), Name: "disk", Domain: "default", Owner: h.o.Owner, Signer: h.o.Signer, Recipients: h.o.Recipients, Architecture: "x86_64", Tool: "instar test",
	}}
}

func (h *importer) stream() *chunked.Stream {
	h.t.Helper()
	img, err := h.o.Store.Resolve(h.t.Context(), "disk", images.ResolveOptions{})
	if err != nil {
		h.t.Fatal(err)
	}
	x, err := img.Open(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	s, err := x.Stream(chunked.StreamDisk)
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

// roundTrip imports a disk and reads it back.
func (h *importer) roundTrip(data []byte, m sparse.Map) *capture.ImageResult {
	h.t.Helper()
	res, err := capture.ImportImage(h.t.Context(), h.o, capture.ReadDisk(bytes.NewReader(data), int64(len(data)), m), &quiet{})
	if err != nil {
		h.t.Fatalf("%d bytes, %v: %v", len(data), m, err)
	}
	s := h.stream()
	back := make([]byte, s.Size())
	if n, err := s.ReaderAt(h.t.Context(), 16<<20).ReadAt(back, 0); n < len(back) {
		h.t.Fatal(err)
	}
	if !bytes.Equal(back, data) {
		h.t.Fatalf("%d bytes, %v: not what was imported", len(data), m)
	}
	return res
}

// TestImportSizes imports disks of every awkward size, dense, with holes that
// are known, and with zeros that are not; the same bytes add no pack.
func TestImportSizes(t *testing.T) {
	h := newImporter(t)
	r := rand.New(rand.NewPCG(1, 8))
	for _, size := range []int64{
		1, 511, 4095, 4096, 4097, 8191, 12288, 512<<10 - 1, 512 << 10, 512<<10 + 1, 516 << 10, 1<<20 - 4096, 1 << 20, 1<<20 + 512, 1234567, 3 << 20, 3<<20 + 1,
	} {
		data := make([]byte, size)
		var m sparse.Map
		for at := int64(0); at < size; {
			n := min(1+r.Int64N(300_000), size-at)
			for i := range n {
				data[at+i] = byte(r.Uint32())
			}
			m = m.Append(sparse.Extent{Off: at, Len: n})
			at += n + r.Int64N(700_000)
		}
		first := h.roundTrip(data, m)
		again := h.roundTrip(data, sparse.Dense(size))
		if again.PacksAdded != 0 {
			t.Errorf("%d bytes, read instead of known: %d packs added after %d", size, again.PacksAdded, first.PacksAdded)
		}
	}
}

// TestImportZeros imports disks without data: known, and not known.
func TestImportZeros(t *testing.T) {
	h := newImporter(t)
	for _, size := range []int64{1, 4096, 5 << 20, 5<<20 + 17} {
		for _, m := range []sparse.Map{{}, sparse.Dense(size)} {
			if res := h.roundTrip(make([]byte, size), m); res.PacksAdded != 0 || res.Manifest.Data != 0 {
				t.Errorf("%d zeros: %d packs, %d bytes of data", size, res.PacksAdded, res.Manifest.Data)
			}
		}
	}
}

// TestImportLarge imports a TiB with data at its ends and in between.
func TestImportLarge(t *testing.T) {
	h := newImporter(t)
	const size = 1 << 40
	at := []int64{0, 4<<30 - 4096, 1<<39 + 512, size - 700_001}
	data := []byte(string(bytes.Repeat([]byte("data of a large disk "), 33_334)))[:700_000]
	var m sparse.Map
	for _, off := range at {
		m = m.Append(sparse.Extent{Off: off, Len: int64(len(data))})
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	read := readerAt(func(p []byte, off int64) (int, error) {
		for _, a := range at {
			if off >= a && off+int64(len(p)) <= a+int64(len(data)) {
				return copy(p, data[off-a:]), nil
			}
		}
		return 0, io.ErrUnexpectedEOF
	})
	if _, err := capture.ImportImage(t.Context(), h.o, capture.ReadDisk(read, size, m), &quiet{}); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 400<<20 {
		t.Errorf("%d bytes were allocated", used)
	}
	s := h.stream()
	if s.Size() != size {
		t.Fatalf("%d bytes", s.Size())
	}
	back := make([]byte, len(data))
	for _, a := range at {
		if n, err := s.ReaderAt(t.Context(), 8<<20).ReadAt(back, a); n < len(back) || !bytes.Equal(back, data) {
			t.Errorf("at %d: other bytes came back: %v", a, err)
		}
	}
}

type readerAt func(p []byte, off int64) (int, error)

func (f readerAt) ReadAt(p []byte, off int64) (int, error) { return f(p, off) }

// TestImportFails publishes nothing when a disk cannot be read to its end, gives
// too little or too much, or when the import is given up.
func TestImportFails(t *testing.T) {
	h := newImporter(t)
	h.roundTrip([]byte("there before"), sparse.Dense(12))
	was := h.stream()
	broken := errors.New("the disk is broken")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	large := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
	for _, c := range []struct {
		name string
		ctx  context.Context
		size int64
		fill func(ctx context.Context, out ec2.Output) error
		want error
	}{
		{"unreadable", t.Context(), 1 << 30, func(_ context.Context, out ec2.Output) error {
			if _, err := out.Write(large); err != nil {
				return err
			}
			return broken
		}, broken},
		{"too short", t.Context(), 1 << 30, func(_ context.Context, out ec2.Output) error { _, err := out.Write(large); return err }, capture.ErrImageSize},
		{"too long", t.Context(), 1 << 20, func(_ context.Context, out ec2.Output) error { _, err := out.Write(large); return err }, capture.ErrImageSize},
		{"skips too far", t.Context(), 1 << 20, func(_ context.Context, out ec2.Output) error { return out.Skip(1 << 40) }, capture.ErrImageSize},
		{"given up", ctx, 1 << 30, func(ctx context.Context, out ec2.Output) error { cancel(); return ctx.Err() }, context.Canceled},
		{"empty", t.Context(), 0, func(context.Context, ec2.Output) error { return nil }, capture.ErrImageSize},
	} {
		_, err := capture.ImportImage(c.ctx, h.o, capture.ImportDisk{Size: c.size, Fill: c.fill}, &quiet{})
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if now := h.stream(); now.Size() != was.Size() {
		t.Errorf("something of %d bytes was published", now.Size())
	}
	if n := len(h.objects("images/disk/manifests")); n != 1 {
		t.Errorf("%d manifests", n)
	}
	if n := len(h.objects("runs")); n != 0 {
		t.Errorf("%d runs are left", n)
	}
}
