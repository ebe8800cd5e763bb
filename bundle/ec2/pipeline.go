package ec2

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha1"
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/instar-image/instar/bundle/sparse"
)

// pipeline turns the image's data into parts:
//
//	Image.Write -> pieces of memberSize -> workers compress -> in order: digest,
//	encrypt, cut into parts -> senders digest and store
//
// Pieces and part buffers circulate in fixed numbers, which bounds memory.
type pipeline struct {
	img      Image
	m        *Manifest
	member   member
	header   []byte
	partSize int
	digits   int
	naming   Naming
	workers  int
	inFlight int
	sink     PartSink
	cbc      cipher.BlockMode

	free    chan *piece // to be filled
	jobs    chan *piece // to be compressed
	ordered chan *piece // the same pieces in the order of the archive
	bufs    chan []byte // part buffers
	outbox  chan Part

	mu    sync.Mutex
	parts []ManifestPart // grows as parts are stored
	bytes int64
}

type piece struct {
	raw, packed []byte
	done        chan struct{} // capacity 1: packed is ready
}

func newPipeline(o BundleOptions, img Image, m *Manifest, key, iv BlockKey, sink PartSink) (*pipeline, error) {
	p := &pipeline{img: img, m: m, sink: sink, naming: o.Naming, partSize: o.PartSize, inFlight: o.InFlight, workers: o.Workers}
	if p.partSize == 0 {
		p.partSize = DefaultPartSize
	}
	if p.partSize < MinPartSize || p.partSize > MaxPartSize || p.partSize%aes.BlockSize != 0 {
		return nil, fail(ErrOption, "part size", "%d bytes is not a multiple of 16 between %d and %d", p.partSize, MinPartSize, MaxPartSize)
	}
	if p.inFlight <= 0 {
		p.inFlight = max(1, min(3, (48<<20)/p.partSize))
	}
	if p.workers <= 0 {
		p.workers = min(runtime.GOMAXPROCS(0), 16)
	}
	if img.Size <= 0 {
		return nil, fail(ErrOption, "image", "is %d bytes long: there is nothing to bundle", img.Size)
	}
	if img.Map == nil {
		p.img.Map = sparse.Dense(img.Size)
	}
	if err := p.img.Map.Check(img.Size); err != nil {
		return nil, &Error{Class: ErrOption, Object: "image", Detail: "its map of data", Err: err}
	}
	p.member = member{name: img.Name, size: img.Size, data: alignMap(p.img.Map, img.Size), mtime: img.Mtime, mode: img.Mode & 0o7777}
	if p.member.mode == 0 {
		p.member.mode = 0o644
	}
	p.header = p.member.header()
	p.digits = digitsFor(p.worstCase()/int64(p.partSize)+1, p.naming)
	if longest := partName(img.Name, 0, p.digits); len(longest) > 255 {
		return nil, fail(ErrOption, "bundle name", "%q is too long for names of parts", img.Name)
	}
	p.cbc = cipher.NewCBCEncrypter(newBlock(key), iv[:])
	return p, nil
}

// worstCase is how many bytes the parts have if nothing can be compressed.
func (p *pipeline) worstCase() int64 {
	raw := p.member.archiveSize(len(p.header))
	return raw/memberSize*int64(memberBound(memberSize)) + int64(memberBound(int(raw%memberSize))) + aes.BlockSize
}

func (p *pipeline) run(ctx context.Context) error {
	pieces := 2*p.workers + 1
	p.free, p.jobs, p.ordered = make(chan *piece, pieces), make(chan *piece, pieces), make(chan *piece, pieces)
	for range pieces {
		p.free <- &piece{done: make(chan struct{}, 1)}
	}
	p.bufs, p.outbox = make(chan []byte, p.inFlight+1), make(chan Part)
	for range p.inFlight + 1 {
		p.bufs <- nil // allocated when first used: small images need one
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.produce(ctx) })
	for range p.workers {
		g.Go(func() error { return p.compress(ctx) })
	}
	g.Go(func() error { return p.encrypt(ctx) })
	for range p.inFlight {
		g.Go(func() error { return p.send(ctx) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return p.rename(ctx)
}

// produce writes the archive into pieces.
func (p *pipeline) produce(ctx context.Context) error {
	w := &pieceWriter{ctx: ctx, p: p}
	if _, err := w.Write(p.header); err != nil {
		return err
	}
	data := newPadWriter(w, p.img.Map, p.member.data)
	err := p.img.Write(ctx, data)
	if err == nil {
		err = data.finish()
	}
	if err != nil {
		return fmt.Errorf("writing the image: %w", err)
	}
	total := p.member.archiveSize(len(p.header))
	for w.written < total {
		if _, err := w.Write(data.zero[:min(total-w.written, tarBlock)]); err != nil {
			return err
		}
	}
	if err := w.flush(); err != nil {
		return err
	}
	close(p.jobs)
	close(p.ordered)
	return nil
}

type pieceWriter struct {
	ctx     context.Context // of the one run this writer lives in
	p       *pipeline
	cur     *piece
	written int64
}

func (w *pieceWriter) Write(b []byte) (int, error) {
	total := len(b)
	for len(b) > 0 {
		if w.cur == nil {
			select {
			case w.cur = <-w.p.free:
			case <-w.ctx.Done():
				return total - len(b), context.Cause(w.ctx)
			}
			if w.cur.raw == nil {
				w.cur.raw = make([]byte, 0, memberSize)
			}
			w.cur.raw = w.cur.raw[:0]
		}
		n := min(len(b), memberSize-len(w.cur.raw))
		w.cur.raw = append(w.cur.raw, b[:n]...)
		w.written += int64(n)
		b = b[n:]
		if len(w.cur.raw) == memberSize {
			if err := w.flush(); err != nil {
				return total - len(b), err
			}
		}
	}
	return total, nil
}

// flush hands the current piece on; the channels have room for all pieces.
func (w *pieceWriter) flush() error {
	if w.cur == nil {
		return nil
	}
	w.p.jobs <- w.cur
	w.p.ordered <- w.cur
	w.cur = nil
	return nil
}

func (p *pipeline) compress(ctx context.Context) error {
	var d deflater
	for {
		select {
		case c, ok := <-p.jobs:
			if !ok {
				return nil
			}
			packed, err := d.member(c.packed[:0], c.raw)
			if err != nil {
				return fmt.Errorf("compressing: %w", err)
			}
			c.packed = packed
			c.done <- struct{}{}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// encrypt takes the pieces in order: the archive's digest, then CBC, which is
// sequential by nature, into part buffers.
func (p *pipeline) encrypt(ctx context.Context) error {
	digest := sha1.New()
	c := &partCutter{p: p, ctx: ctx}
	for {
		var next *piece
		var ok bool
		select {
		case next, ok = <-p.ordered:
		case <-ctx.Done():
			return ctx.Err()
		}
		if !ok {
			break
		}
		digest.Write(next.raw)
		select {
		case <-next.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := c.write(next.packed); err != nil {
			return err
		}
		p.free <- next
	}
	n := aes.BlockSize - c.total%aes.BlockSize
	if err := c.write(bytes.Repeat([]byte{byte(n)}, n)); err != nil {
		return err
	}
	if err := c.flush(); err != nil {
		return err
	}
	close(p.outbox)
	digest.Sum(p.m.Digest[:0])
	return nil
}

type partCutter struct {
	p     *pipeline
	ctx   context.Context // of the one run this cutter lives in
	buf   []byte
	done  int // bytes of buf already encrypted
	index int
	total int // bytes modulo the block size
}

func (c *partCutter) write(b []byte) error {
	c.total = (c.total + len(b)) % aes.BlockSize
	for len(b) > 0 {
		if c.buf == nil {
			select {
			case c.buf = <-c.p.bufs:
			case <-c.ctx.Done():
				return c.ctx.Err()
			}
			c.buf = c.buf[:0]
		}
		n := min(len(b), c.p.partSize-len(c.buf))
		c.buf = append(c.grown(n), b[:n]...)
		b = b[n:]
		whole := len(c.buf) / aes.BlockSize * aes.BlockSize
		c.p.cbc.CryptBlocks(c.buf[c.done:whole], c.buf[c.done:whole])
		c.done = whole
		if len(c.buf) == c.p.partSize {
			if err := c.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// grown makes room for n more bytes: all a part needs at once, unless the
// whole bundle is smaller than that.
func (c *partCutter) grown(n int) []byte {
	if len(c.buf)+n <= cap(c.buf) {
		return c.buf
	}
	return make([]byte, 0, min(int64(c.p.partSize), c.p.worstCase()))
}

func (c *partCutter) flush() error {
	if c.buf == nil {
		return nil
	}
	part := Part{Index: c.index, Name: partName(c.p.m.Name, c.index, c.p.digits), Data: c.buf}
	select {
	case c.p.outbox <- part:
	case <-c.ctx.Done():
		return c.ctx.Err()
	}
	c.index++
	c.buf, c.done = nil, 0
	return nil
}

func (p *pipeline) send(ctx context.Context) error {
	for {
		select {
		case part, ok := <-p.outbox:
			if !ok {
				return nil
			}
			part.SHA1 = sha1.Sum(part.Data)
			if err := p.sink.PutPart(ctx, part); err != nil {
				return fmt.Errorf("storing part %q: %w", part.Name, err)
			}
			p.mu.Lock()
			for len(p.parts) <= part.Index {
				p.parts = append(p.parts, ManifestPart{})
			}
			p.parts[part.Index] = ManifestPart{Filename: part.Name, SHA1: part.SHA1}
			p.bytes += int64(len(part.Data))
			p.mu.Unlock()
			p.bufs <- part.Data
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// rename gives the parts their final names, where the sink can.
func (p *pipeline) rename(ctx context.Context) error {
	digits := digitsFor(int64(len(p.parts)), p.naming)
	if r, ok := p.sink.(PartRenamer); ok && digits != p.digits {
		for i := range p.parts {
			to := partName(p.m.Name, i, digits)
			if err := r.RenamePart(ctx, p.parts[i].Filename, to); err != nil {
				return fmt.Errorf("renaming part %q to %q: %w", p.parts[i].Filename, to, err)
			}
			p.parts[i].Filename = to
		}
	}
	p.m.Parts, p.m.BundledSize = p.parts, p.bytes
	return nil
}
