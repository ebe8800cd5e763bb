package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/sparse"
)

// ErrImageSize is wrapped by errors about an image that has not the size it
// was said to have.
var ErrImageSize = errors.New("image size differs")

// OpenImage takes an existing image: a file, whose holes are kept, or a block
// device. size is what it must have in bytes, 0 if that does not matter. The
// file is open until close is called.
func OpenImage(path string, size int64) (img ec2.Image, closeFile func() error, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO is refused, not waited for
	if err != nil {
		return img, nil, fmt.Errorf("opening the image: %w", err)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	st, err := f.Stat()
	if err != nil {
		return img, nil, fmt.Errorf("opening the image: %w", err)
	}
	img = ec2.Image{Name: filepath.Base(path), Mtime: st.ModTime(), Mode: uint32(st.Mode().Perm())}
	var m sparse.Map
	switch {
	case st.Mode().IsRegular():
		img.Size = st.Size()
		if m, err = sparse.Scan(int(f.Fd()), img.Size); err != nil {
			return img, nil, fmt.Errorf("reading the image's holes: %w", err)
		}
		if m == nil {
			m = sparse.Map{} // nothing but a hole
		}
	case st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0:
		if img.Size, err = f.Seek(0, io.SeekEnd); err != nil {
			return img, nil, fmt.Errorf("finding the size of %s: %w", path, err)
		}
		m = sparse.Dense(img.Size)
		img.Mode = 0o644
	default:
		return img, nil, fmt.Errorf("%w: %s is neither a file nor a block device", ErrOption, path)
	}
	if img.Size == 0 {
		return img, nil, fmt.Errorf("%w: %s is empty", ErrImageSize, path)
	}
	if size != 0 && img.Size != size {
		return img, nil, fmt.Errorf("%w: %s has %d bytes, not %d", ErrImageSize, path, img.Size, size)
	}
	img.Map = m
	img.Write = func(ctx context.Context, w io.Writer) error {
		_, err := io.CopyBuffer(w, ctxReader{ctx, sparse.NewReader(f, m)}, make([]byte, 1<<20))
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("%w: %s became shorter while it was read", ErrImageSize, path)
		}
		return err
	}
	return img, f.Close, nil
}

// ReadImage takes an image of exactly size bytes from a stream.
func ReadImage(r io.Reader, name string, size int64) ec2.Image {
	return ec2.Image{
		Name: name, Size: size, Mtime: time.Now(), Mode: 0o644,
		Write: func(ctx context.Context, w io.Writer) error {
			r := Interruptible(ctx, r)
			n, err := io.CopyBuffer(w, io.LimitReader(r, size), make([]byte, 1<<20))
			if err != nil {
				return err
			}
			if n < size {
				return fmt.Errorf("%w: the stream ended after %d of %d bytes", ErrImageSize, n, size)
			}
			if k, _ := io.ReadFull(r, make([]byte, 1)); k > 0 {
				return fmt.Errorf("%w: the stream has more than %d bytes", ErrImageSize, size)
			}
			return nil
		},
	}
}

// Interruptible returns a reader of r that ends with ctx's error at once, even
// while r waits for a pipe that says nothing. The read that waits is left
// behind: r must not be used any more after that.
func Interruptible(ctx context.Context, r io.Reader) io.Reader {
	i := &interruptible{ctx: ctx, pieces: make(chan piece), free: make(chan []byte, 2)}
	i.free <- make([]byte, 1<<20)
	i.free <- make([]byte, 1<<20)
	go i.pump(r)
	return i
}

type interruptible struct {
	ctx    context.Context
	pieces chan piece
	free   chan []byte
	at     piece
	rest   []byte
}

type piece struct {
	buf []byte
	n   int
	err error
}

func (i *interruptible) pump(r io.Reader) {
	for {
		var p piece
		select {
		case p.buf = <-i.free:
		case <-i.ctx.Done():
			return
		}
		p.n, p.err = r.Read(p.buf)
		select {
		case i.pieces <- p:
		case <-i.ctx.Done():
			return
		}
		if p.err != nil {
			return
		}
	}
}

func (i *interruptible) Read(b []byte) (int, error) {
	if err := i.ctx.Err(); err != nil {
		return 0, err
	}
	for len(i.rest) == 0 {
		if i.at.err != nil {
			return 0, i.at.err
		}
		if i.at.buf != nil {
			i.free <- i.at.buf
		}
		select {
		case i.at = <-i.pieces:
			i.rest = i.at.buf[:i.at.n]
		case <-i.ctx.Done():
			i.at.buf = nil
			return 0, i.ctx.Err()
		}
	}
	n := copy(b, i.rest)
	i.rest = i.rest[n:]
	return n, nil
}

// ctxReader ends with the context's error.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (r ctxReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}
