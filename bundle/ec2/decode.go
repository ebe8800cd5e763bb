package ec2

import (
	"bufio"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha1"
	"errors"
	"hash"
	"io"
	"runtime"

	"github.com/klauspost/compress/gzip"
	"golang.org/x/sync/errgroup"
)

// Output takes an image from its first byte to its last: runs of data and
// runs of zeros. [sparse.Writer] is one.
type Output interface {
	Write(p []byte) (int, error)
	Skip(n int64) error // n zeros
	// Finish is called once after all else went well, and returns how many
	// bytes the image has.
	Finish() (int64, error)
}

// decoder turns ciphertext into the image:
//
//	feed -> CBC -> gzip members (ours: inflated in parallel) -> in order:
//	digest, tar -> Output
type decoder struct {
	key, iv BlockKey
	// size is what the image must have; negative if nobody said.
	size int64
	out  Output

	member *member // what was found
	digest SHA1    // of the archive
}

// run decodes what feed passes to its argument. feed runs in a goroutine of
// its own; a nil return of it ends the ciphertext.
func (d *decoder) run(ctx context.Context, feed func(ctx context.Context, w io.Writer) error) error {
	workers := min(runtime.GOMAXPROCS(0), 16)
	pieces := 2*workers + 1
	s := &splitter{
		free:    make(chan *packedPiece, pieces),
		jobs:    make(chan *packedPiece, pieces),
		ordered: make(chan *packedPiece, pieces),
	}
	for range pieces {
		s.free <- &packedPiece{done: make(chan error, 1)}
	}
	g, ctx := errgroup.WithContext(ctx)
	s.ctx = ctx
	pr, pw := newPipe(ctx)
	g.Go(func() error {
		dw := &cbcWriter{w: pw, mode: cipher.NewCBCDecrypter(newBlock(d.key), d.iv[:])}
		if err := feed(ctx, dw); err != nil {
			return err
		}
		if err := dw.finish(); err != nil {
			return err
		}
		return pw.Close()
	})
	g.Go(func() error { return s.split(bufio.NewReaderSize(pr, 64<<10)) })
	for range workers {
		g.Go(s.inflate)
	}
	g.Go(func() error { return d.consume(s) })
	return g.Wait()
}

// consume reads the archive.
func (d *decoder) consume(s *splitter) error {
	r := &spanReader{s: s, sum: sha1.New()}
	t := &tarStream{r: r}
	m, err := t.readHeader()
	if err != nil {
		return err
	}
	d.member = m
	if d.size >= 0 && m.size != d.size {
		return fail(ErrSize, objArchive, "the image in it has %d bytes, not %d", m.size, d.size)
	}
	if err := t.copyData(m, d.out); err != nil {
		return err
	}
	r.sum.Sum(d.digest[:0])
	return nil
}

// cbcWriter decrypts what is written to it in place (the caller's bytes are
// overwritten). It holds back the last block, whose padding finish removes.
type cbcWriter struct {
	w    io.Writer
	mode cipher.BlockMode
	held []byte // undecrypted: a last whole block, or the start of one
}

func (c *cbcWriter) Write(b []byte) (int, error) {
	total := len(b)
	// Complete what is held back to a whole block, then let it go.
	for len(c.held) > 0 && len(b) > 0 {
		if len(c.held) == aes.BlockSize {
			c.mode.CryptBlocks(c.held, c.held)
			if _, err := c.w.Write(c.held); err != nil {
				return 0, err
			}
			c.held = c.held[:0]
			break
		}
		n := min(aes.BlockSize-len(c.held), len(b))
		c.held = append(c.held, b[:n]...)
		b = b[n:]
	}
	if len(b) == 0 {
		return total, nil
	}
	whole := (len(b) - 1) / aes.BlockSize * aes.BlockSize // keeps 1 to 16 bytes
	keep := b[whole:]
	c.held = append(c.held[:0], keep...)
	c.mode.CryptBlocks(b[:whole], b[:whole])
	if whole > 0 {
		if _, err := c.w.Write(b[:whole]); err != nil {
			return 0, err
		}
	}
	return total, nil
}

func (c *cbcWriter) finish() error {
	if len(c.held) != aes.BlockSize {
		return fail(ErrTruncated, "ciphertext in the parts", "is not a positive multiple of %d bytes long", aes.BlockSize)
	}
	c.mode.CryptBlocks(c.held, c.held)
	last, err := unpad(c.held)
	if err != nil {
		return &Error{Class: ErrKey, Object: "ciphertext in the parts", Detail: "does not decrypt with this key", Err: err}
	}
	if len(last) == 0 {
		return nil
	}
	_, err = c.w.Write(last)
	return err
}

// pipe passes bytes between two goroutines that may both be cancelled.
type pipe struct {
	ctx  context.Context // of the one run this pipe lives in
	data chan []byte
	back chan struct{}
	cur  []byte
}

func newPipe(ctx context.Context) (*pipe, *pipe) {
	p := &pipe{ctx: ctx, data: make(chan []byte), back: make(chan struct{})}
	return p, p
}

func (p *pipe) Write(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	select {
	case p.data <- b:
	case <-p.ctx.Done():
		return 0, p.ctx.Err()
	}
	select {
	case <-p.back:
		return len(b), nil
	case <-p.ctx.Done():
		return 0, p.ctx.Err()
	}
}

func (p *pipe) Close() error { close(p.data); return nil }

func (p *pipe) Read(b []byte) (int, error) {
	if len(p.cur) == 0 {
		select {
		case next, ok := <-p.data:
			if !ok {
				return 0, io.EOF
			}
			p.cur = next
		case <-p.ctx.Done():
			return 0, p.ctx.Err()
		}
	}
	n := copy(b, p.cur)
	if p.cur = p.cur[n:]; len(p.cur) == 0 {
		select {
		case p.back <- struct{}{}:
		case <-p.ctx.Done():
			return 0, p.ctx.Err()
		}
	}
	return n, nil
}

// A packedPiece is a gzip member of ours, or a stretch of the archive that
// was inflated on the way.
type packedPiece struct {
	packed []byte
	raw    []byte
	done   chan error // capacity 1
}

// splitter finds the members in the gzip stream.
type splitter struct {
	ctx     context.Context // of the one run this splitter lives in
	free    chan *packedPiece
	jobs    chan *packedPiece
	ordered chan *packedPiece
}

func (s *splitter) get() (*packedPiece, error) {
	select {
	case c := <-s.free:
		return c, nil
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
}

// split reads r to its end. Once a member is not ours, the rest is read as a
// plain gzip stream, which has no way back.
func (s *splitter) split(r *bufio.Reader) error {
	for first := true; ; first = false {
		h, err := r.Peek(memberHeader)
		if len(h) == 0 && errors.Is(err, io.EOF) && !first {
			break
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		packed, raw, ok := memberLengths(h)
		if !ok {
			if err := s.plain(r, first, h); err != nil {
				return err
			}
			break
		}
		c, err := s.get()
		if err != nil {
			return err
		}
		c.packed, c.raw = sized(c.packed, packed), sized(c.raw, raw)
		if _, err := io.ReadFull(r, c.packed); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = gzipError(io.ErrUnexpectedEOF)
			}
			return err
		}
		s.jobs <- c
		s.ordered <- c
	}
	close(s.jobs)
	close(s.ordered)
	return nil
}

// sized returns b with length n, anew if it is too small.
func sized(b []byte, n int) []byte {
	if cap(b) < n {
		b = make([]byte, n)
	}
	return b[:n]
}

// plainPiece is how much is inflated at a time of a foreign gzip stream.
const plainPiece = 256 << 10

func (s *splitter) plain(r *bufio.Reader, first bool, h []byte) error {
	if len(h) < 2 || h[0] != 0x1f || h[1] != 0x8b {
		if first {
			return fail(ErrKey, objArchive, "is not gzip: decrypted with a wrong key, or not an EC2 bundle")
		}
		return fail(ErrFormat, objArchive, "bytes after its gzip stream")
	}
	z, err := gzip.NewReader(r)
	for err == nil {
		c, gerr := s.get()
		if gerr != nil {
			return gerr
		}
		c.raw = sized(c.raw, plainPiece)
		var n int
		n, err = io.ReadFull(z, c.raw)
		if errors.Is(err, io.ErrUnexpectedEOF) && n > 0 {
			// Either a last short piece or a stream that breaks off: the
			// next read tells which.
			var probe [1]byte
			if k, perr := z.Read(probe[:]); k == 0 && perr == io.EOF {
				err = io.EOF
			}
		}
		c.raw = c.raw[:n]
		c.done <- nil
		s.ordered <- c
	}
	if cerr := s.ctx.Err(); cerr != nil {
		return cerr
	}
	if err == io.EOF && z != nil {
		return nil
	}
	if errors.Is(err, gzip.ErrHeader) {
		return fail(ErrFormat, objArchive, "bytes after its gzip stream, or no gzip stream")
	}
	return gzipError(err)
}

func (s *splitter) inflate() error {
	var d inflater
	for {
		select {
		case c, ok := <-s.jobs:
			if !ok {
				return nil
			}
			c.done <- d.member(c.raw, c.packed)
		case <-s.ctx.Done():
			return s.ctx.Err()
		}
	}
}

// spanReader reads the inflated pieces in order and digests them on the way.
type spanReader struct {
	s   *splitter
	sum hash.Hash
	cur *packedPiece
	b   []byte // what is left of cur
}

// span returns the next bytes, at least one and at most n, valid until the
// next call. At the end of the archive it returns io.EOF.
func (r *spanReader) span(n int64) ([]byte, error) {
	for len(r.b) == 0 {
		if r.cur != nil {
			r.s.free <- r.cur
			r.cur = nil
		}
		select {
		case c, ok := <-r.s.ordered:
			if !ok {
				return nil, io.EOF
			}
			select {
			case err := <-c.done:
				if err != nil {
					return nil, err
				}
			case <-r.s.ctx.Done():
				return nil, r.s.ctx.Err()
			}
			r.cur, r.b = c, c.raw
			r.sum.Write(r.b)
		case <-r.s.ctx.Done():
			return nil, r.s.ctx.Err()
		}
	}
	out := r.b[:min(n, int64(len(r.b)))]
	r.b = r.b[len(out):]
	return out, nil
}

func (r *spanReader) Read(p []byte) (int, error) {
	b, err := r.span(int64(len(p)))
	return copy(p, b), err
}
