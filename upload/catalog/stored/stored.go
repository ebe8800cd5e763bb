// Package stored is what an image looks like as one object: a tar archive whose
// first member says what the others are (SPEC.md).
//
// What goes in: a head, members with their sizes and digests, and where their
// bytes come from. What comes out: the archive as a stream, verified on the way;
// and from such an object its head, and its members as a read-only
// [upload.Store] that verifies what is read whole. It touches the object it is
// given and nothing else. What a head says is its reader's to verify.
package stored

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/upload"
)

const (
	// HeadName is the name of the first member.
	HeadName = "instar-stored-image"

	// MaxHead is how many bytes the first member may have.
	MaxHead = 65 << 20

	// MaxMembers is how many members there may be behind it.
	MaxMembers = 1 << 20

	block = 512 // of tar

	maxSize = 1<<53 - 1 // bytes of an object
)

// What a caller may branch on.
var (
	ErrDamaged = errors.New("not the bytes that its digest says")
	ErrFormat  = errors.New("not an image as one object")
)

// Member is a piece of an image in the archive. It has one of the two digests.
type Member struct {
	Name   string `json:"name"`   // a key as upload.CheckKey has them
	Offset int64  `json:"offset"` // of its first byte, from the end of the head
	Size   int64  `json:"size"`   // bytes
	SHA256 string `json:"sha256,omitempty"`
	SHA1   string `json:"sha1,omitempty"` // of what only has this, as an EC2 bundle's parts
}

// digest makes the hash and says what it has to come to.
func (m *Member) digest() (hash.Hash, []byte, error) {
	h, text := sha256.New(), m.SHA256
	if m.SHA256 == "" {
		h, text = ec2.NewPartDigest(), m.SHA1
	}
	want, err := hex.DecodeString(text)
	if err != nil || len(want) != h.Size() || hex.EncodeToString(want) != text || m.SHA256 != "" && m.SHA1 != "" {
		return nil, nil, fmt.Errorf("%w: member %.200q has not one digest in hex", ErrFormat, m.Name)
	}
	return h, want, nil
}

// header is what stands before a member: one block, or three where the name or
// size needs them.
func header(name string, size int64, at time.Time) ([]byte, error) {
	var err error
	for _, format := range []tar.Format{tar.FormatUSTAR, tar.FormatPAX} {
		var b bytes.Buffer
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: at.UTC().Truncate(time.Second), Format: format}
		if err = tar.NewWriter(&b).WriteHeader(h); err == nil {
			return b.Bytes(), nil
		}
	}
	return nil, fmt.Errorf("member %.200q of %d bytes: %w", name, size, err)
}

// padding is how many bytes follow n bytes up to the next block.
func padding(n int64) int64 { return -n & (block - 1) }

// Lay gives members their places, one behind the other, and says how many bytes
// the archive has from the end of the head on. at is the time the members are of.
func Lay(members []Member, at time.Time) (int64, error) {
	if len(members) == 0 || len(members) > MaxMembers {
		return 0, fmt.Errorf("%w: %d members, at most %d", ErrFormat, len(members), MaxMembers)
	}
	var off int64
	for i := range members {
		m := &members[i]
		if m.Size < 0 || m.Size > maxSize-off {
			return 0, fmt.Errorf("%w: member %.200q has %d bytes", ErrFormat, m.Name, m.Size)
		}
		h, err := header(m.Name, m.Size, at)
		if err != nil {
			return 0, err
		}
		m.Offset = off + int64(len(h))
		off = m.Offset + m.Size + padding(m.Size)
	}
	return off + 2*block, nil
}

// HeadSize is how many bytes of the archive a head of n bytes takes.
func HeadSize(n int) int64 { return block + int64(n) + padding(int64(n)) }

// Reader gives the archive's bytes.
type Reader struct {
	ctx     context.Context
	members []Member // not begun yet
	at      time.Time
	open    func(ctx context.Context, m Member) (io.ReadCloser, error)

	ready bytes.Reader // goes first
	now   *Member      // whose bytes come behind it
	body  io.ReadCloser
	left  int64
	hash  hash.Hash
	want  []byte
	ended bool
	err   error // of all that follows
}

// NewReader makes an archive of a head and members that [Lay] has laid with the
// same time. open gives a member's bytes, of which exactly Size are read; what
// is not what its digest says is [ErrDamaged], before the last byte. The caller
// closes the Reader.
func NewReader(ctx context.Context, head []byte, members []Member, at time.Time, open func(ctx context.Context, m Member) (io.ReadCloser, error)) (*Reader, error) {
	if len(head) == 0 || len(head) > MaxHead {
		return nil, fmt.Errorf("%w: a head of %d bytes", ErrFormat, len(head))
	}
	h, err := header(HeadName, int64(len(head)), at)
	if err != nil {
		return nil, err
	}
	r := &Reader{ctx: ctx, members: members, at: at, open: open}
	front := append(h, head...)
	r.ready.Reset(append(front, make([]byte, padding(int64(len(head))))...))
	return r, nil
}

// Read implements io.Reader.
func (r *Reader) Read(p []byte) (int, error) {
	for r.err == nil {
		if r.ready.Len() > 0 {
			return r.ready.Read(p)
		}
		if r.now != nil {
			n, err := r.member(p)
			if err != nil {
				r.err = fmt.Errorf("%s: %w", r.now.Name, err)
				break
			}
			if n > 0 {
				return n, nil
			}
			continue
		}
		r.err = r.next()
	}
	return 0, r.err
}

// next begins what follows.
func (r *Reader) next() error {
	if len(r.members) == 0 {
		if r.ended {
			return io.EOF
		}
		r.ended = true
		r.ready.Reset(make([]byte, 2*block))
		return nil
	}
	m := r.members[0]
	r.members = r.members[1:]
	h, err := header(m.Name, m.Size, r.at)
	if err != nil {
		return err
	}
	if r.hash, r.want, err = m.digest(); err != nil {
		return err
	}
	if r.body, err = r.open(r.ctx, m); err != nil {
		return err
	}
	r.ready.Reset(h)
	r.now, r.left = &m, m.Size
	return nil
}

// member reads on in a member, and ends it.
func (r *Reader) member(p []byte) (int, error) {
	if r.left > 0 {
		n, err := r.body.Read(p[:min(int64(len(p)), r.left)])
		r.hash.Write(p[:n])
		r.left -= int64(n)
		if err == io.EOF && r.left > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err == io.EOF {
			err = nil
		}
		if err == nil && r.left == 0 && !bytes.Equal(r.hash.Sum(nil), r.want) {
			err = ErrDamaged
		}
		return n, err
	}
	if r.now.Size == 0 && !bytes.Equal(r.hash.Sum(nil), r.want) {
		return 0, ErrDamaged
	}
	err := r.body.Close()
	r.ready.Reset(make([]byte, padding(r.now.Size)))
	r.body, r.now = nil, nil
	if err != nil {
		return 0, err
	}
	return 0, nil
}

// Close ends reading.
func (r *Reader) Close() error {
	if r.body == nil {
		return nil
	}
	err := r.body.Close()
	r.body, r.now = nil, nil
	if r.err == nil {
		r.err = io.ErrClosedPipe
	}
	return err
}

// Object is an image as one object, whose head was read and not verified.
type Object struct {
	Head []byte // the first member
	Size int64  // of the whole object, bytes
	ETag string

	store upload.Store
	key   string
	base  int64 // of the members' offsets
}

// firstRead is how much is fetched at once: most heads fit.
const firstRead = 256 << 10

// Open reads the head of an object. What is no such object is [ErrFormat].
func Open(ctx context.Context, s upload.Store, key string) (*Object, error) {
	r, at, err := s.Get(ctx, key, upload.GetOptions{Length: firstRead})
	if err != nil {
		return nil, err
	}
	front, err := io.ReadAll(io.LimitReader(r, firstRead))
	if err = errors.Join(err, r.Close()); err != nil {
		return nil, err
	}
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%s/%s: %w: %s", s, key, ErrFormat, fmt.Sprintf(format, a...))
	}
	if len(front) < block || !bytes.HasPrefix(front, append([]byte(HeadName), 0)) {
		return nil, bad("it does not begin with %s", HeadName)
	}
	h, err := tar.NewReader(bytes.NewReader(front[:block])).Next()
	if err != nil || h.Typeflag != tar.TypeReg || h.Name != HeadName {
		return nil, bad("its first member is not a file named %s", HeadName)
	}
	if h.Size < 1 || h.Size > MaxHead || HeadSize(int(h.Size)) > at.Size {
		return nil, bad("its head would have %d bytes, the object has %d", h.Size, at.Size)
	}
	o := &Object{Size: at.Size, ETag: at.ETag, store: s, key: key, base: HeadSize(int(h.Size))}
	o.Head = front[block:min(int64(len(front)), block+h.Size)]
	if missing := h.Size - int64(len(o.Head)); missing > 0 {
		r, _, err := s.Get(ctx, key, upload.GetOptions{Offset: int64(len(front)), Length: missing, IfMatch: at.ETag})
		if err != nil {
			return nil, err
		}
		rest := make([]byte, missing)
		_, err = io.ReadFull(r, rest)
		if err = errors.Join(err, r.Close()); err != nil {
			return nil, fmt.Errorf("%s/%s: %w", s, key, err)
		}
		o.Head = append(bytes.Clone(o.Head), rest...)
	}
	return o, nil
}
