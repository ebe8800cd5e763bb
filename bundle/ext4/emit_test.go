package ext4_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
)

// emitImage writes what a plan emits to a new file and holds it to the order it promises.
func emitImage(t reporter, path string, p *ext4.Plan, src filetree.Source, o ext4.EmitOptions) {
	t.Helper()
	f, err := os.Create(path)
	check(t, err)
	defer f.Close()
	check(t, f.Truncate(p.Size()))
	emitInto(t, f, p, src, o)
}

func emitInto(t reporter, f *os.File, p *ext4.Plan, src filetree.Source, o ext4.EmitOptions) {
	t.Helper()
	var last ext4.Piece
	metadata := false
	seen := map[filetree.ID]bool{}
	check(t, p.Emit(context.Background(), src, o, func(s ext4.Piece) error {
		defer s.Release()
		switch {
		case s.Len != int64(len(s.Data)) || s.Len%4096 != 0 || s.Len == 0 || s.Len > 1<<20 || s.Pos%4096 != 0 || s.Pos+s.Len > p.Size():
			t.Errorf("piece %+v with %d bytes", s.Segment, len(s.Data))
		case s.Kind == ext4.KindData:
			if metadata || s.ID != last.ID && seen[s.ID] || s.ID == last.ID && seen[s.ID] && s.Off < last.Off+last.Len || s.ID < last.ID {
				t.Errorf("data %+v after %+v", s.Segment, last.Segment)
			}
			if o.Skip != nil && o.Skip(s.ID) {
				t.Errorf("data of %d, which is to be skipped", s.ID)
			}
			seen[s.ID] = true
		default:
			if metadata && s.Pos < last.Pos+last.Len || s.Pos>>20 != (s.Pos+s.Len-1)>>20 || s.ID != filetree.None {
				t.Errorf("metadata %+v after %+v", s.Segment, last.Segment)
			}
			if bytes.Equal(s.Data[:4096], zeroBlock[:]) || bytes.Equal(s.Data[s.Len-4096:], zeroBlock[:]) {
				t.Errorf("metadata %+v has zeros at an end", s.Segment)
			}
			metadata = true
		}
		last = ext4.Piece{Segment: s.Segment}
		_, err := f.WriteAt(s.Data, s.Pos)
		return err
	}))
}

// same compares two files by their data.
func sameImage(t reporter, a, b string) {
	t.Helper()
	f, err := os.Open(a)
	check(t, err)
	defer f.Close()
	g, err := os.Open(b)
	check(t, err)
	defer g.Close()
	st, err := f.Stat()
	check(t, err)
	x, y := make([]byte, 1<<20), make([]byte, 1<<20)
	var both sparse.Map
	for _, h := range []*os.File{f, g} {
		m, err := sparse.Scan(int(h.Fd()), st.Size())
		check(t, err)
		both = append(both, m...)
	}
	for _, e := range both {
		for at := e.Off; at < e.End(); at += 1 << 20 {
			n := min(1<<20, e.End()-at)
			if _, err := f.ReadAt(x[:n], at); err != nil {
				t.Fatal(err)
			}
			if _, err := g.ReadAt(y[:n], at); err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			if i := slices.Compare(x[:n], y[:n]); i != 0 {
				t.Fatalf("images differ within %d bytes from %d", n, at)
			}
		}
	}
}

// What a plan emits is what it writes, whatever happens to the files, and
// whichever of those that nothing happened to are skipped.
func TestEmitEqualsWrite(t *testing.T) {
	dir := t.TempDir()
	written, emitted := filepath.Join(dir, "written"), filepath.Join(dir, "emitted")
	rapid.Check(t, func(rt *rapid.T) {
		tree := randomTree(rt)
		p, err := ext4.NewPlan(tree, ext4.Options{Headroom: 1 << 20})
		check(rt, err)
		src := &memSource{t: tree, faults: randomFaults(rt, tree)}
		var a, b []string
		check(rt, os.RemoveAll(written))
		check(rt, os.RemoveAll(emitted))
		writeImage(rt, written, p, src, func(c ext4.Change) { a = append(a, c.String()) })
		skip := rapid.IntRange(1, 4).Draw(rt, "skip")
		skipped := func(id filetree.ID) bool {
			f := src.faults[id]
			return int(id)%skip == 1 && f.open == nil && !f.changed && f.bad == nil
		}
		emitImage(rt, emitted, p, src, ext4.EmitOptions{Skip: skipped, Report: func(c ext4.Change) { b = append(b, c.String()) }})
		if !slices.Equal(a, b) {
			rt.Errorf("changes differ:\n%q\n%q", a, b)
		}
		f, err := os.OpenFile(emitted, os.O_RDWR, 0)
		check(rt, err)
		defer f.Close()
		for s := range p.Segments() {
			if s.Kind == ext4.KindData && skipped(s.ID) {
				data := make([]byte, s.Len)
				content(s.ID, tree.Data(s.ID), data, s.Off)
				_, err := f.WriteAt(data, s.Pos)
				check(rt, err)
			}
		}
		sameImage(rt, written, emitted)
		sameImage(rt, emitted, written)
	})
}

// Data around copies of the superblock, in holes, and larger than a piece.
func TestEmitLarge(t *testing.T) {
	sizes := map[string]int64{"a": 130 * mib, "b": 5*mib + 1, "c": 70_000, "d": 65_536, "e": 1, "f": 0, "g": 300 * mib}
	tree := files(t, sizes, map[string]sparse.Map{"b": {{Off: 5000, Len: 3 * mib}, {Off: 5 * mib, Len: 1}}, "d": {{Off: 40960, Len: 4096}}})
	p := plan(t, tree, ext4.Options{})
	dir := t.TempDir()
	written, emitted := filepath.Join(dir, "written"), filepath.Join(dir, "emitted")
	writeImage(t, written, p, &memSource{t: tree}, nil)
	emitImage(t, emitted, p, &memSource{t: tree}, ext4.EmitOptions{Report: func(c ext4.Change) { t.Error(c.String()) }})
	sameImage(t, written, emitted)
	sameImage(t, emitted, written)
	fsck(t, emitted)
}

// A sink may keep pieces while it gets others: their memory is not used again.
func TestEmitOwnership(t *testing.T) {
	tree := some(t)
	p := plan(t, tree, ext4.Options{})
	img := image(t, p, &memSource{t: tree}, nil)
	f, err := os.Open(img)
	check(t, err)
	defer f.Close()
	var wait sync.WaitGroup
	var kept []ext4.Piece
	check(t, p.Emit(t.Context(), &memSource{t: tree}, ext4.EmitOptions{}, func(s ext4.Piece) error {
		if len(kept) < 300 {
			kept = append(kept, s)
			return nil
		}
		for _, s := range append(kept, s) {
			wait.Go(func() {
				defer s.Release()
				want := make([]byte, s.Len)
				_, err := f.ReadAt(want, s.Pos)
				if err != nil || !bytes.Equal(s.Data, want) {
					t.Errorf("piece %+v has changed (%v)", s.Segment, err)
				}
			})
		}
		kept = nil
		return nil
	}))
	wait.Wait()
	for _, s := range kept {
		s.Release()
	}
}

func TestEmitErrors(t *testing.T) {
	tree := files(t, map[string]int64{"a": 5 << 20, "b": 3 << 20, "c": 100, "d": 100}, nil)
	p := plan(t, tree, ext4.Options{})
	o := ext4.EmitOptions{Report: func(c ext4.Change) { t.Errorf("blamed on a file: %s", c.String()) }}
	pieces := 0
	check(t, p.Emit(t.Context(), &memSource{t: tree}, o, func(ext4.Piece) error { pieces++; return nil }))
	for n := range pieces {
		left := n
		err := p.Emit(t.Context(), &memSource{t: tree}, o, func(ext4.Piece) error {
			if left--; left < 0 {
				return unix.ENOSPC
			}
			return nil
		})
		if !errors.Is(err, unix.ENOSPC) {
			t.Errorf("sink that fails after %d pieces: %v", n, err)
		}
	}
	stop := errors.New("stopped")
	for n := range pieces - 1 { // after the last one it is too late
		ctx, cancel := context.WithCancelCause(t.Context())
		left := n
		err := p.Emit(ctx, &memSource{t: tree}, o, func(ext4.Piece) error {
			if left--; left < 0 {
				cancel(stop)
			}
			return nil
		})
		if !errors.Is(err, stop) {
			t.Errorf("cancelled after %d of %d pieces: %v", n, pieces, err)
		}
		cancel(nil)
	}
}
