package ec2

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/bundle/sparse"
)

// Image is what is to be bundled.
type Image struct {
	// Name of the bundle: parts are NAME.part.N. It is a plain file name.
	Name string
	// Size in bytes of the image, holes included; at least 1.
	Size int64
	// Map says which bytes Write gives; all else is zero. nil (but not an
	// empty map) means all of them.
	Map sparse.Map
	// Mtime and Mode (permission bits; 0 means 0644) go into the archive.
	Mtime time.Time
	Mode  uint32
	// Write writes the bytes of Map to w, extent after extent in order. A
	// write error of w is to be returned as it is.
	Write func(ctx context.Context, w io.Writer) error
}

// Part is a finished piece of a bundle.
type Part struct {
	Index int
	Name  string
	Data  []byte // valid until PutPart returns
	SHA1  SHA1
}

// PartSink stores parts. PutPart returns once the part is stored. It is called
// from up to [BundleOptions.InFlight] goroutines at a time, with parts in about
// but not exactly ascending order. It has to retry by itself: an error ends
// the bundling.
type PartSink interface {
	PutPart(ctx context.Context, p Part) error
}

// PartRenamer is what a [PartSink] may also be. How many digits ec2-ami-tools
// gives the numbers of the parts follows from how many parts there are, which
// is known at the end: a sink that can rename gets the worst case's names first
// and is told the final ones then. Others keep the worst case's names, which
// all tools read.
type PartRenamer interface {
	RenamePart(ctx context.Context, from, to string) error
}

// Naming is how parts are numbered.
type Naming int

// Ways to number parts.
const (
	NamingEC2  Naming = iota // as many digits as the number of parts has
	NamingEuca               // at least two digits
)

// Limits and default of the size of parts, in bytes.
const (
	MinPartSize     = 4 << 10
	MaxPartSize     = 512 << 20
	DefaultPartSize = 10 << 20
)

// BundleOptions say what goes into the manifest and who can open the bundle.
type BundleOptions struct {
	Arch               string // as in [Manifest]; any, none is refused
	Account            string // digits
	Type               string // "" means TypeMachine
	KernelID           string
	RamdiskID          string
	KernelName         string
	BlockDeviceMapping []Mapping
	ProductCodes       []string
	Ancestors          []string
	Bundler            Bundler // zero means Instar's own

	EC2Cert  *x509.Certificate // of the cloud; required
	UserCert *x509.Certificate // nil: the user's encrypted key is left empty
	Key      *rsa.PrivateKey   // signs; nil: the manifest says UNSIGNED

	// EncKey and EncIV are the key and initialisation vector of the parts;
	// nil means random ones. Never use a pair for two images.
	EncKey, EncIV *BlockKey

	PartSize int // bytes, a multiple of 16; 0 means DefaultPartSize
	Naming   Naming

	// InFlight bounds how many parts are in PutPart at a time; each takes
	// PartSize of memory. 0 means 3, or fewer if they are larger than 16 MiB.
	InFlight int
	// Workers is the number of goroutines that compress; 0 means one for each
	// processor, at most 16. Each takes about 8 MiB of memory.
	Workers int
}

// DefaultBundler is what a manifest says of who made it.
var defaultBundler = Bundler{Name: "instar", Version: "1.0", Release: "1"}

// Bundle writes img as parts to sink and returns the manifest, also as the
// signed document. It never stores the manifest: the caller does, last, so
// that a bundle without one is seen to be incomplete. Options that cannot be
// used give an error of class ErrOption before anything is written; errors of
// img and sink are returned wrapped.
func Bundle(ctx context.Context, o BundleOptions, img Image, sink PartSink) (*Manifest, []byte, error) {
	m, key, iv, err := o.manifest(img)
	if err != nil {
		return nil, nil, err
	}
	w, err := newPipeline(o, img, m, key, iv, sink)
	if err != nil {
		return nil, nil, err
	}
	if err := w.run(ctx); err != nil {
		return nil, nil, fmt.Errorf("bundling %q: %w", img.Name, err)
	}
	doc, err := m.encode(o.Key)
	if err != nil {
		return nil, nil, err
	}
	return m, doc, nil
}

// manifest makes all of the manifest that is known before the parts are.
func (o *BundleOptions) manifest(img Image) (m *Manifest, key, iv BlockKey, err error) {
	m = &Manifest{
		Version: Version20071010, Bundler: o.Bundler,
		Arch: o.Arch, BlockDeviceMapping: o.BlockDeviceMapping, KernelID: o.KernelID, RamdiskID: o.RamdiskID,
		ProductCodes: o.ProductCodes, Name: img.Name, Account: o.Account, Type: o.Type,
		KernelName: o.KernelName, Ancestors: o.Ancestors, Size: img.Size,
	}
	if m.Bundler == (Bundler{}) {
		m.Bundler = defaultBundler
	}
	if m.Type == "" {
		m.Type = TypeMachine
	}
	if err := m.check(); err != nil {
		return nil, key, iv, err
	}
	for _, k := range []struct{ given, to *BlockKey }{{o.EncKey, &key}, {o.EncIV, &iv}} {
		if k.given != nil {
			*k.to = *k.given
			continue
		}
		if _, err := rand.Read(k.to[:]); err != nil {
			return nil, key, iv, fmt.Errorf("making a key: %w", err)
		}
	}
	if o.EC2Cert == nil {
		return nil, key, iv, fail(ErrOption, "cloud's certificate", "none given")
	}
	for _, to := range []struct {
		cert    *x509.Certificate
		key, iv *[]byte
	}{{o.EC2Cert, &m.EC2Key, &m.EC2IV}, {o.UserCert, &m.UserKey, &m.UserIV}} {
		if to.cert == nil {
			continue
		}
		if *to.key, *to.iv, err = wrapPair(to.cert, key, iv); err != nil {
			return nil, key, iv, err
		}
	}
	return m, key, iv, nil
}

// wrapPair encrypts key and iv for the owner of cert.
func wrapPair(cert *x509.Certificate, key, iv BlockKey) (wrappedKey, wrappedIV []byte, err error) {
	pub, err := keys.PublicKey(cert)
	if err == nil {
		wrappedKey, err = wrap(pub, key)
	}
	if err == nil {
		wrappedIV, err = wrap(pub, iv)
	}
	if err != nil {
		return nil, nil, &Error{Class: ErrOption, Object: "certificate", Detail: "encrypting the bundle's key", Err: err}
	}
	return wrappedKey, wrappedIV, nil
}

// partName is NAME.part.I with I in digits places.
func partName(name string, i, digits int) string {
	return fmt.Sprintf("%s.part.%0*d", name, digits, i)
}

func digitsFor(count int64, n Naming) int {
	d := len(strconv.FormatInt(count, 10))
	if n == NamingEuca {
		return max(d, 2)
	}
	return d
}
