package ec2

import (
	"context"
	"crypto/sha1"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sync/errgroup"
)

// PartSource gives the parts of a bundle by the names in its manifest.
// OpenPart is called from several goroutines. A part that does not exist is an
// error that wraps io/fs.ErrNotExist or the source's own; retrying is the
// source's business.
type PartSource interface {
	OpenPart(ctx context.Context, name string) (io.ReadCloser, error)
}

// A fetched part has been read completely and its digest was right.
type fetched struct {
	mem  []byte
	file *os.File // instead of mem for large parts: an unlinked temporary file
	size int64
	buf  []byte // mem's buffer, to be used again
	err  error
}

func (f *fetched) close() {
	if f.file != nil {
		f.file.Close()
	}
}

// writeTo passes the part's bytes to w, which may change them.
func (f *fetched) writeTo(w io.Writer) error {
	if f.file == nil {
		_, err := w.Write(f.mem)
		return err
	}
	return copyChunks(w, io.NewSectionReader(f.file, 0, f.size))
}

// copyChunks is io.Copy without its shortcuts: w may change what it is given.
func copyChunks(w io.Writer, r io.Reader) error {
	buf := make([]byte, readPiece)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil {
				return werr
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

const (
	fetchMemory  = 48 << 20 // for all parts in memory at a time
	fetchAtATime = 8
	readPiece    = 256 << 10
)

// fetcher reads parts ahead, several at a time, and checks each one's digest
// before anybody sees a byte of it.
type fetcher struct {
	m        *Manifest
	src      PartSource
	spoolDir string // for parts that do not fit in memory
	ahead    int
	inMemory int64 // of one part
	bufs     chan []byte
}

func newFetcher(m *Manifest, src PartSource, spoolDir string) *fetcher {
	// All parts but the last have one size; the manifest does not say which.
	likely := max(m.BundledSize, 1)
	if n := int64(len(m.Parts)); n > 1 {
		likely = m.BundledSize/(n-1) + 1
	}
	ahead := int(max(1, min(fetchMemory/likely, fetchAtATime, int64(len(m.Parts)))))
	f := &fetcher{m: m, src: src, spoolDir: spoolDir, ahead: ahead, inMemory: fetchMemory / int64(ahead)}
	f.bufs = make(chan []byte, ahead+1)
	for range ahead + 1 {
		f.bufs <- nil
	}
	return f
}

// part reads and checks part i into buf, or a file if it is large.
func (f *fetcher) part(ctx context.Context, i int, buf []byte) (*fetched, error) {
	want := f.m.Parts[i]
	r, err := f.src.OpenPart(ctx, want.Filename)
	if err != nil {
		return nil, fmt.Errorf("opening part %q: %w", want.Filename, err)
	}
	defer r.Close()
	p, digest, err := f.read(ctx, r, want.Filename, buf)
	if err != nil {
		return nil, err
	}
	if digest != want.SHA1 {
		p.close()
		return nil, fail(ErrDigest, objPart(want.Filename), "its %d bytes have SHA-1 %s, the manifest says %s: damaged, or not this bundle's", p.size, digest, want.SHA1)
	}
	return p, nil
}

func (f *fetcher) read(ctx context.Context, r io.Reader, name string, buf []byte) (p *fetched, digest SHA1, err error) {
	sum := sha1.New()
	got := &fetched{}
	defer func() {
		if err != nil {
			got.close()
		}
	}()
	// No part may be longer than all of them together are said to be.
	limit := f.m.BundledSize
	buf = buf[:0]
	for {
		if err := ctx.Err(); err != nil {
			return nil, digest, err
		}
		if cap(buf)-len(buf) < readPiece {
			// Grows by doubling, since a manifest may promise what never comes.
			grown := make([]byte, len(buf), min(max(2*cap(buf), 1<<20), int(f.inMemory))+readPiece)
			copy(grown, buf)
			buf = grown
		}
		n, err := r.Read(buf[len(buf) : len(buf)+readPiece])
		sum.Write(buf[len(buf) : len(buf)+n])
		buf = buf[:len(buf)+n]
		got.size += int64(n)
		if got.size > limit {
			return nil, digest, fail(ErrSize, objPart(name), "is longer than the whole bundle, %d bytes by its manifest", limit)
		}
		end := errors.Is(err, io.EOF)
		if err != nil && !end {
			return nil, digest, fmt.Errorf("reading part %q: %w", name, err)
		}
		if got.file != nil || int64(len(buf)) > f.inMemory {
			if err := f.spool(got, buf); err != nil {
				return nil, digest, err
			}
			buf = buf[:0]
		}
		if end {
			break
		}
	}
	sum.Sum(digest[:0])
	got.buf = buf
	if got.file == nil {
		got.mem = buf
	}
	return got, digest, nil
}

func (f *fetcher) spool(p *fetched, b []byte) (err error) {
	if p.file == nil {
		if p.file, err = os.CreateTemp(f.spoolDir, ".instar-part-*"); err != nil {
			return fmt.Errorf("making room for a large part: %w", err)
		}
		if err := os.Remove(p.file.Name()); err != nil {
			return fmt.Errorf("making room for a large part: %w", err)
		}
	}
	if _, err := p.file.Write(b); err != nil {
		return fmt.Errorf("making room for a large part: %w", err)
	}
	return nil
}

// each fetches all parts and calls use for each, in order. use must not keep
// the part. What of the parts remains after an error is not fetched.
func (f *fetcher) each(ctx context.Context, use func(i int, p *fetched) error) error {
	return f.eachResult(ctx, func(i int, p *fetched) error {
		if p.err != nil {
			return p.err
		}
		return use(i, p)
	})
}

// eachResult is like each, but goes on after a part that cannot be had: use
// gets its error in p.err.
func (f *fetcher) eachResult(ctx context.Context, use func(i int, p *fetched) error) error {
	g, ctx := errgroup.WithContext(ctx)
	results := make([]chan *fetched, len(f.m.Parts))
	for i := range results {
		results[i] = make(chan *fetched, 1)
	}
	next := make(chan int)
	g.Go(func() error {
		defer close(next)
		for i := range f.m.Parts {
			select {
			case next <- i:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	for range f.ahead {
		g.Go(func() error {
			for {
				// The buffer comes first: who waits for a buffer must not
				// hold a part that others wait for.
				var buf []byte
				select {
				case buf = <-f.bufs:
				case <-ctx.Done():
					return ctx.Err()
				}
				i, ok := <-next
				if !ok {
					return nil
				}
				p, err := f.part(ctx, i, buf)
				if err != nil {
					p = &fetched{err: err}
				}
				results[i] <- p // in order of the parts, whoever fails first
			}
		})
	}
	g.Go(func() error {
		for i := range results {
			select {
			case p := <-results[i]:
				err := use(i, p)
				p.close()
				if err != nil {
					return err
				}
				f.bufs <- p.buf
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	err := g.Wait()
	if err != nil { // close what was fetched and not used
		for _, c := range results {
			select {
			case p := <-c:
				p.close()
			default:
			}
		}
	}
	return err
}
