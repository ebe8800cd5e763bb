// Package upload keeps objects: in an S3 bucket or in a directory.
//
// What goes in: bytes under a key. What comes out: the same bytes, or an
// [*Error] that says what failed, on which object, in the server's own words,
// and which errors.Is one of this package's sentinels where a caller may want
// to branch. [Open] makes a [Store] of a URL; [Upload] and [Download] move many
// files with bounded memory and skip what is there and intact; [CheckWritable]
// and [EnsureBucket] find out before the work begins what would stop its end.
//
// The package touches the network (only the configured endpoint, the
// credential sources of the AWS SDK, proxies), the store's directory and the
// directories it is told to download into. It does not log.
package upload

import (
	"bytes"
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"
)

// Store holds objects under keys, relative to the store's root (a bucket and
// prefix, or a directory).
//
// All methods may be called concurrently. They retry what is worth retrying
// (see [Retry]), so callers need not; a cancelled ctx means that no further
// operation is begun. Returned errors are or wrap *[Error].
//
// Keys are relative paths of non-empty segments divided by "/", none of them
// "." or ".."; others are refused with [ErrKey].
type Store interface {
	// String is the store's URL, without credentials.
	String() string

	// Put stores body's bytes [0, size) under key and replaces what was
	// there. nil means the object is durable and complete: no reader ever
	// sees a part of it. The same bytes may be put again. body is read
	// concurrently with nothing else, possibly several times, and not after
	// Put has returned.
	//
	// With IfNoneMatch or IfMatch a refused precondition is [ErrExist]; when
	// the reply to an attempt was lost and the next attempt is refused, the
	// stored content decides: equal to body's counts as success.
	Put(ctx context.Context, key string, body io.ReaderAt, size int64, o PutOptions) (Object, error)

	// PutStream is Put for a body whose length is not known. It buffers at
	// most PutOptions.PartSize * (PutOptions.Parallel+2) bytes. When r fails, nothing is
	// stored and the error wraps r's.
	PutStream(ctx context.Context, key string, r io.Reader, o PutOptions) (Object, error)

	// Get opens an object, or a range of it. The reader delivers exactly the
	// bytes promised by Object.Size and the range, or fails: with
	// [ErrChanged] when the object was replaced meanwhile, with
	// io.ErrUnexpectedEOF in the chain when it ended early. A range beginning
	// at or past the end gives no bytes. The content is not verified: whoever
	// knows a digest checks it.
	Get(ctx context.Context, key string, o GetOptions) (io.ReadCloser, Object, error)

	// Stat describes an object; [ErrNotExist] when there is none.
	Stat(ctx context.Context, key string) (Object, error)

	// List yields the objects whose key begins with prefix (any string, need
	// not end at a "/"), in byte order of their keys. It ends after the first
	// error it yields. Objects put or deleted meanwhile may be missed.
	List(ctx context.Context, prefix string) iter.Seq2[Object, error]

	// Delete removes objects; one that does not exist is no error. It goes on
	// after a key that cannot be removed and returns a *[DeleteError] naming
	// every one of them. In a versioned bucket it leaves the versions: see
	// [Versioner].
	Delete(ctx context.Context, keys ...string) error

	// Copy makes dst a copy of src without the bytes passing through here,
	// under the same guarantees as Put.
	Copy(ctx context.Context, dst, src string, o PutOptions) (Object, error)

	// Close releases idle connections and handles. The store must not be used
	// afterwards.
	Close() error
}

// Object describes a stored object.
type Object struct {
	Key      string
	Size     int64     // bytes
	ETag     string    // opaque, without quotes, for PutOptions.IfMatch and GetOptions.IfMatch; a list may leave it empty
	MD5      []byte    // of the content; nil when the store does not tell (multipart or encrypted objects, directories)
	SHA256   []byte    // of the content; nil when the store does not tell
	Modified time.Time // by the store's clock

	mark string // of the multipart upload that made it; only from HEAD
}

// ACL is a canned access control list, as x-amz-acl takes it.
type ACL string

// The access control lists the bundle tools know. MinIO accepts any of them
// and ignores it: there, bucket policies decide who may read.
const (
	ACLDefault     ACL = "" // the store's: Options.ACL
	ACLPrivate     ACL = "private"
	ACLPublicRead  ACL = "public-read"
	ACLAWSExecRead ACL = "aws-exec-read"
	ACLBundleRead  ACL = "ec2-bundle-read" // Eucalyptus
)

// PutOptions says how to put; the zero value is usable.
type PutOptions struct {
	IfNoneMatch bool   // only if nothing is stored under the key
	IfMatch     string // only if what is stored has this ETag
	ACL         ACL
	ContentType string // default application/octet-stream

	// Tags are the object's, at most 10: keys of 1-128 characters, values of at
	// most 256. A store that has no tags, as a directory, refuses them with
	// [ErrUnsupported]; so does Copy.
	Tags map[string]string
	// Metadata is kept with the object where the store has a place for it; a
	// directory has none. Names are lower-case letters, digits and "-", values
	// printable ASCII.
	Metadata map[string]string

	// MD5 and SHA256 of the whole body, where the caller has them anyway:
	// they save a pass over the body and the server checks them.
	MD5    []byte
	SHA256 []byte
	// Fresh says that SHA256 was computed a moment ago from the very memory that
	// is the body: a store with nothing in between does not compute it again.
	Fresh bool

	// PartSize and Parallel rule multipart uploads: PutStream, and Put above
	// 5 GiB. Default 16 MiB (at least 5 MiB) and 4.
	PartSize int64
	Parallel int

	// Progress, if set, is told of bytes as they leave; negative when an
	// attempt failed and they will be sent again. It may be called
	// concurrently.
	Progress func(delta int64)
}

// GetOptions selects what Get returns; the zero value is the whole object.
type GetOptions struct {
	Offset  int64  // first byte, >= 0
	Length  int64  // bytes; 0 means up to the end
	IfMatch string // fail with ErrChanged unless the object has this ETag
}

// PutBytes is Put for data in memory.
func PutBytes(ctx context.Context, s Store, key string, data []byte, o PutOptions) (Object, error) {
	return s.Put(ctx, key, bytes.NewReader(data), int64(len(data)), o)
}

// GetBytes reads a whole object of at most limit bytes ([ErrTooLarge] if it has
// more) and checks it against the store's digest where there is one; content
// that stays wrong is [ErrCorrupt].
func GetBytes(ctx context.Context, s Store, key string, limit int64) ([]byte, Object, error) {
	for try := 1; ; try++ {
		b, o, err := getBytes(ctx, s, key, limit)
		if err == nil || try == corruptTries || !errors.Is(err, ErrCorrupt) {
			return b, o, err
		}
	}
}

func getBytes(ctx context.Context, s Store, key string, limit int64) ([]byte, Object, error) {
	r, o, err := s.Get(ctx, key, GetOptions{})
	if err != nil {
		return nil, o, err
	}
	defer r.Close()
	if o.Size > limit {
		return nil, o, newError("get", s.String(), key, ErrTooLarge, fmt.Errorf("%d bytes, at most %d are read", o.Size, limit))
	}
	b := make([]byte, o.Size)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, o, newError("get", s.String(), key, nil, err)
	}
	if sum := md5.Sum(b); o.MD5 != nil && !bytes.Equal(sum[:], o.MD5) {
		return nil, o, newError("get", s.String(), key, ErrCorrupt, fmt.Errorf("MD5 is %x, should be %x", sum, o.MD5))
	}
	return b, o, nil
}

// BucketManager is implemented by stores that live in a bucket.
type BucketManager interface {
	// Bucket is the bucket's name.
	Bucket() string
	// Location is where the bucket is, "" being the classic default region
	// (us-east-1); [ErrNoBucket] when it does not exist, [ErrAccess] when it
	// belongs to somebody else.
	Location(ctx context.Context) (string, error)
	// CreateBucket creates it in a location ("", a region, or one of the old
	// names "US" and "EU"). One that exists and is ours is no error.
	CreateBucket(ctx context.Context, location string) error
	// DeleteBucket removes the bucket, which must be empty ([ErrNotEmpty]).
	DeleteBucket(ctx context.Context) error
}

// Version is one version of an object in a versioned bucket.
type Version struct {
	Key      string
	ID       string // "null" for one from before versioning
	Latest   bool
	Marker   bool // a delete marker: no content
	Size     int64
	Modified time.Time
}

// Versioner is implemented by stores that may keep old versions.
type Versioner interface {
	// Versions yields every version and delete marker of the keys beginning
	// with prefix, newest first within a key. In a bucket without versioning
	// these are the objects themselves.
	Versions(ctx context.Context, prefix string) iter.Seq2[Version, error]
	// DeleteVersions removes versions for good. Those under a retention
	// period or legal hold are in the *[DeleteError] with [ErrLocked] and are
	// not tried again.
	DeleteVersions(ctx context.Context, vs ...Version) error
}

// Placer is implemented by stores whose URL does not say everything.
type Placer interface {
	// Place tells the store from all others, for whoever remembers things about
	// it: two services may have a bucket of the same name.
	Place() string
}

// Clock is implemented by stores with a clock of their own.
type Clock interface {
	// ServerTime asks the server for its time (whole seconds), to the
	// precision of the request's duration.
	ServerTime(ctx context.Context) (time.Time, error)
}

// Presigner is implemented by stores that can hand out a URL which needs no
// credentials.
type Presigner interface {
	// PresignGet returns a URL that reads the object for the given time (at
	// most 7 days). It asks nobody: the object need not exist.
	PresignGet(ctx context.Context, key string, valid time.Duration) (string, error)
}
