package chunked

import "github.com/klauspost/compress/zstd"

// SealSegment seals the plaintext of a segment as an object of the store. The
// reference lacks the segment's place.
func (d *Domain) SealSegment(s []byte, l Level) (SegmentRef, []byte, error) {
	z, err := newPacker(l)
	if err != nil {
		return SegmentRef{}, nil, err
	}
	ref, data := d.sealSegment(z, s)
	return ref, data, nil
}

func (d *Domain) sealSegment(z *packer, s []byte) (SegmentRef, []byte) {
	k := d.SegmentKey(DigestOf(s))
	codec, b := z.pack(s)
	data := AppendSeal(make([]byte, 0, len(b)+SealOverhead), k, TypeSegment, codec, b)
	return SegmentRef{Name: NameOf(data), Key: k, Plain: int32(len(s)), Stored: int32(len(data))}, data
}

// SealRoot seals the plaintext of a root with an image's index key.
func SealRoot(k Key, r []byte, l Level) (Name, []byte, error) {
	z, err := newPacker(l)
	if err != nil {
		return Name{}, nil, err
	}
	codec, b := z.pack(r)
	data := AppendSeal(make([]byte, 0, len(b)+SealOverhead), k, TypeRoot, codec, b)
	return NameOf(data), data, nil
}

// OpenSegment checks and reads the segment object that ref names. data is
// overwritten.
func OpenSegment(ref SegmentRef, data []byte) (*Segment, error) {
	u, err := newUnpacker()
	if err != nil {
		return nil, err
	}
	defer u.dec.Close()
	return u.segment(ref, data)
}

func (u *unpacker) segment(ref SegmentRef, data []byte) (*Segment, error) {
	object := "index segment " + ref.Name.String()
	if err := checkObject(object, ref.Name, int64(ref.Stored), data); err != nil {
		return nil, err
	}
	p, err := u.openExact(object, ref.Key, TypeSegment, data, int(ref.Plain), nil)
	if err != nil {
		return nil, err
	}
	return decodeSegment(object, p, ref.Length)
}

// OpenRoot checks and reads the root object n with an image's index key. data
// is overwritten.
func OpenRoot(n Name, k Key, data []byte) (*Root, error) {
	u, err := newUnpacker()
	if err != nil {
		return nil, err
	}
	defer u.dec.Close()
	return u.root(n, k, data)
}

func (u *unpacker) root(n Name, k Key, data []byte) (*Root, error) {
	object := "index root " + n.String()
	if err := checkObject(object, n, int64(len(data)), data); err != nil {
		return nil, err
	}
	c, p, err := openSeal(object, k, TypeRoot, data)
	if err != nil {
		return nil, err
	}
	if c == Zstd {
		// Nobody but its frame says how long a root is.
		var h zstd.Header
		if err := h.Decode(p); err != nil {
			return nil, &Error{Class: ErrFormat, Object: object, Detail: "zstd", Err: err}
		}
		if !h.HasFCS || h.FrameContentSize > MaxRoot {
			return nil, bad(ErrFormat, object, "its zstd frame does not say its length, or more than %d", MaxRoot)
		}
		if p, err = u.expand(object, p, int(h.FrameContentSize), nil); err != nil {
			return nil, err
		}
	}
	return decodeRoot(object, p)
}

func checkObject(object string, n Name, size int64, data []byte) error {
	if int64(len(data)) != size {
		return bad(ErrCorrupt, object, "it has %d bytes, not %d", len(data), size)
	}
	if got := NameOf(data); got != n {
		return bad(ErrCorrupt, object, "its bytes have the name %s", got)
	}
	return nil
}
