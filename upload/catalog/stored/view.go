package stored

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/instar-image/instar/upload"
)

// view is the members of an object as a store that is only read.
type view struct {
	o       *Object
	members map[string]Member
	names   []string // ascending
}

// View shows members, which a verified head has named, as a read-only store: a
// key is a member's name. What is read whole is verified as it is read, with
// [ErrDamaged] before its end. Closing it closes nothing beneath. Members that
// lie outside the object, or over each other, are [ErrFormat].
func (o *Object) View(members []Member) (upload.Store, error) {
	v := &view{o: o, members: make(map[string]Member, len(members))}
	if len(members) == 0 || len(members) > MaxMembers {
		return nil, fmt.Errorf("%w: %d members", ErrFormat, len(members))
	}
	end := int64(0)
	for _, m := range members {
		if err := upload.CheckKey(m.Name); err != nil {
			return nil, fmt.Errorf("%w: a member: %w", ErrFormat, err)
		}
		if _, _, err := m.digest(); err != nil {
			return nil, err
		}
		if m.Offset < end || m.Size < 0 || m.Offset > o.Size-o.base || m.Size > o.Size-o.base-m.Offset {
			return nil, fmt.Errorf("%w: member %.200q has %d bytes from %d on, the object has %d", ErrFormat, m.Name, m.Size, m.Offset, o.Size)
		}
		if _, twice := v.members[m.Name]; twice {
			return nil, fmt.Errorf("%w: member %.200q is there twice", ErrFormat, m.Name)
		}
		end = m.Offset + m.Size
		v.members[m.Name] = m
		v.names = append(v.names, m.Name)
	}
	slices.Sort(v.names)
	return v, nil
}

func (v *view) String() string { return v.o.store.String() + "/" + v.o.key }

func (v *view) fail(op, key string, kind, err error) error {
	return &upload.Error{Op: op, Store: v.String(), Key: key, Kind: kind, Err: err}
}

func (v *view) refuse(op, key string) error {
	return v.fail(op, key, upload.ErrUnsupported, errors.New("an image as one object is only read"))
}

func (v *view) find(op, key string) (Member, upload.Object, error) {
	m, ok := v.members[key]
	if !ok {
		return m, upload.Object{}, v.fail(op, key, upload.ErrNotExist, nil)
	}
	o := upload.Object{Key: key, Size: m.Size, ETag: m.SHA256 + m.SHA1}
	if sum, err := hex.DecodeString(m.SHA256); err == nil && m.SHA256 != "" {
		o.SHA256 = sum
	}
	return m, o, nil
}

func (v *view) Get(ctx context.Context, key string, o upload.GetOptions) (io.ReadCloser, upload.Object, error) {
	m, obj, err := v.find("get", key)
	if err != nil {
		return nil, obj, err
	}
	if o.IfMatch != "" && o.IfMatch != obj.ETag {
		return nil, obj, v.fail("get", key, upload.ErrChanged, nil)
	}
	if o.Offset < 0 {
		return nil, obj, v.fail("get", key, nil, fmt.Errorf("offset %d", o.Offset))
	}
	from := min(o.Offset, m.Size)
	n := m.Size - from
	if o.Length > 0 {
		n = min(n, o.Length)
	}
	body := io.NopCloser(io.Reader(bytes.NewReader(nil)))
	if n > 0 {
		if body, _, err = v.o.store.Get(ctx, v.o.key, upload.GetOptions{Offset: v.o.base + m.Offset + from, Length: n, IfMatch: v.o.ETag}); err != nil {
			return nil, obj, err
		}
	}
	if n != m.Size {
		return body, obj, nil
	}
	h, want, err := m.digest()
	if err != nil {
		return nil, obj, errors.Join(err, body.Close())
	}
	return &verifying{ReadCloser: body, name: v.String() + ": " + key, hash: h, want: want, left: n}, obj, nil
}

// verifying reads a whole member.
type verifying struct {
	io.ReadCloser
	name string
	hash hash.Hash
	want []byte
	left int64
}

func (r *verifying) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.hash.Write(p[:n])
	r.left -= int64(n)
	if (err == nil || err == io.EOF) && r.left <= 0 && !bytes.Equal(r.hash.Sum(nil), r.want) {
		return 0, fmt.Errorf("%s: %w", r.name, ErrDamaged)
	}
	return n, err
}

func (v *view) Stat(_ context.Context, key string) (upload.Object, error) {
	_, o, err := v.find("stat", key)
	return o, err
}

func (v *view) List(ctx context.Context, prefix string) iter.Seq2[upload.Object, error] {
	return func(yield func(upload.Object, error) bool) {
		i, _ := slices.BinarySearch(v.names, prefix)
		for ; i < len(v.names) && strings.HasPrefix(v.names[i], prefix); i++ {
			if ctx.Err() != nil {
				yield(upload.Object{}, v.fail("list", prefix, nil, context.Cause(ctx)))
				return
			}
			_, o, err := v.find("list", v.names[i])
			if !yield(o, err) {
				return
			}
		}
	}
}

func (v *view) Put(_ context.Context, key string, _ io.ReaderAt, _ int64, _ upload.PutOptions) (upload.Object, error) {
	return upload.Object{}, v.refuse("put", key)
}

func (v *view) PutStream(_ context.Context, key string, _ io.Reader, _ upload.PutOptions) (upload.Object, error) {
	return upload.Object{}, v.refuse("put", key)
}

func (v *view) Delete(_ context.Context, keys ...string) error {
	return v.refuse("delete", strings.Join(keys, " "))
}

func (v *view) Copy(_ context.Context, dst, _ string, _ upload.PutOptions) (upload.Object, error) {
	return upload.Object{}, v.refuse("copy", dst)
}

// ServerTime is this machine's clock: nothing here has an age.
func (v *view) ServerTime(context.Context) (time.Time, error) { return time.Now(), nil }

func (v *view) Close() error { return nil }
