package ec2

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/instar-image/instar/bundle/sparse"
)

// failingSink fails at the nth part.
type failingSink struct {
	*memStore
	mu  sync.Mutex
	n   int
	err error
}

func (s *failingSink) PutPart(ctx context.Context, p Part) error {
	s.mu.Lock()
	s.n--
	bad := s.n < 0
	s.mu.Unlock()
	if bad {
		return s.err
	}
	return s.memStore.PutPart(ctx, p)
}

func TestBundleStopsAtTheSinksError(t *testing.T) {
	boom := errors.New("boom")
	o := options(t)
	o.PartSize = MinPartSize
	data := patchwork(3_000_000, 1)
	for n := range 6 {
		sink := &failingSink{memStore: newMemStore(), n: n, err: boom}
		_, doc, err := Bundle(t.Context(), o, memoryImage("img", data, nil), sink)
		if !errors.Is(err, boom) || doc != nil || !strings.Contains(err.Error(), `storing part "img.part.`) {
			t.Errorf("at part %d: %v", n, err)
		}
	}
}

func TestBundleStopsAtTheImagesError(t *testing.T) {
	boom := errors.New("boom")
	o := options(t)
	for name, c := range map[string]struct {
		write func(context.Context, io.Writer) error
		want  string
		is    error
	}{
		"error": {func(context.Context, io.Writer) error { return boom }, "writing the image", boom},
		"short": {func(_ context.Context, w io.Writer) error { _, err := w.Write(make([]byte, 99)); return err }, "less data than its map says", errTooLittle},
		"long":  {func(_ context.Context, w io.Writer) error { _, err := w.Write(make([]byte, 101)); return err }, "more data than its map says", errTooMuch},
	} {
		img := Image{Name: "img", Size: 1000, Map: sparse.Map{{Off: 500, Len: 100}}, Write: c.write}
		_, doc, err := Bundle(t.Context(), o, img, newMemStore())
		if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) || doc != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBundleIsCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	o := options(t)
	img := Image{Name: "img", Size: 1 << 40, Write: func(ctx context.Context, w io.Writer) error {
		cancel()
		for {
			if _, err := w.Write(make([]byte, 1<<20)); err != nil {
				return err
			}
		}
	}}
	if _, _, err := Bundle(ctx, o, img, newMemStore()); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestUnbundleIsCancelled(t *testing.T) {
	user := loadParty(t, "user")
	m := readManifest(t, fixture("ec2-full", "web-1.0.manifest.xml"))
	ctx, cancel := context.WithCancel(t.Context())
	src := sourceFunc(func(ctx context.Context, name string) (io.ReadCloser, error) {
		if strings.HasSuffix(name, "05") {
			cancel()
		}
		return dirSource(fixture("ec2-full")).OpenPart(ctx, name)
	})
	if err := Unbundle(ctx, UnbundleOptions{Key: user.key}, m, src, &nowhere{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

type sourceFunc func(context.Context, string) (io.ReadCloser, error)

func (f sourceFunc) OpenPart(ctx context.Context, name string) (io.ReadCloser, error) {
	return f(ctx, name)
}

// Errors of the source and of the output come back as they are, not as
// something wrong with the bundle; and nothing is left behind.
func TestUnbundleErrorsOfOthers(t *testing.T) {
	user := loadParty(t, "user")
	boom := errors.New("boom")
	m := readManifest(t, fixture("ec2-full", "web-1.0.manifest.xml"))
	o := UnbundleOptions{Key: user.key}
	dir := t.TempDir()
	good := dirSource(fixture("ec2-full"))
	for name, src := range map[string]PartSource{
		"open": sourceFunc(func(ctx context.Context, n string) (io.ReadCloser, error) {
			if strings.HasSuffix(n, "07") {
				return nil, boom
			}
			return good.OpenPart(ctx, n)
		}),
		"read": sourceFunc(func(ctx context.Context, n string) (io.ReadCloser, error) {
			if strings.HasSuffix(n, "07") {
				return io.NopCloser(iotest.ErrReader(boom)), nil
			}
			return good.OpenPart(ctx, n)
		}),
	} {
		err := UnbundleFile(t.Context(), o, m, src, filepath.Join(dir, "out"))
		var e *Error
		if !errors.Is(err, boom) || errors.As(err, &e) || !strings.Contains(err.Error(), "web-1.0.part.07") {
			t.Errorf("%s: %v", name, err)
		}
	}
	full := &failingOutput{left: 20000, err: boom}
	if err := Unbundle(t.Context(), o, m, good, full); !errors.Is(err, boom) {
		t.Errorf("output: %v", err)
	}
	if err := UnbundleFile(t.Context(), o, m, good, filepath.Join(dir, "no", "out")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

type failingOutput struct {
	nowhere
	left int
	err  error
}

func (o *failingOutput) Write(p []byte) (int, error) {
	if o.left -= len(p); o.left < 0 {
		return 0, o.err
	}
	return o.nowhere.Write(p)
}

// A short read at a time changes nothing.
func TestUnbundleFromSlowSource(t *testing.T) {
	user := loadParty(t, "user")
	m := readManifest(t, fixture("ec2-full", "web-1.0.manifest.xml"))
	src := sourceFunc(func(ctx context.Context, n string) (io.ReadCloser, error) {
		r, err := dirSource(fixture("ec2-full")).OpenPart(ctx, n)
		if err != nil {
			return nil, err
		}
		return struct {
			io.Reader
			io.Closer
		}{iotest.DataErrReader(iotest.HalfReader(r)), r}, nil
	})
	img, err := unbundleBytes(t, UnbundleOptions{Key: user.key}, m, src)
	if err != nil || sha256Hex(img) != fixtureSHA256 {
		t.Errorf("%v", err)
	}
}

// A slow sink makes the rest wait instead of piling up parts.
func TestBackPressure(t *testing.T) {
	o := options(t)
	o.PartSize, o.InFlight = 64<<10, 2
	s := &countingSink{}
	if _, _, err := Bundle(t.Context(), o, memoryImage("img", patchwork(8_000_000, 4), nil), s); err != nil {
		t.Fatal(err)
	}
	if s.most > 2 {
		t.Errorf("%d parts in PutPart at a time, allowed are 2", s.most)
	}
}

type countingSink struct {
	mu        sync.Mutex
	now, most int
}

func (s *countingSink) PutPart(context.Context, Part) error {
	s.mu.Lock()
	s.now++
	s.most = max(s.most, s.now)
	s.mu.Unlock()
	time.Sleep(time.Millisecond)
	s.mu.Lock()
	s.now--
	s.mu.Unlock()
	return nil
}
