package ec2

import (
	"crypto/sha1"
	"encoding/hex"
	"hash"
	"strconv"
)

// Versions of the manifest that are read; the first is what is written.
const (
	Version20071010 = "2007-10-10"
	Version20070829 = "20070829" // also written 2007-08-29
	Version3        = "3"
)

// SHA1 is a SHA-1 digest, the format's only one.
type SHA1 [sha1.Size]byte

// Sum is the digest by which a manifest knows a part.
func Sum(part []byte) SHA1 { return sha1.Sum(part) }

// NewSum computes what [Sum] gives of a part that comes in pieces.
func NewSum() hash.Hash { return sha1.New() }

func (d SHA1) String() string { return hex.EncodeToString(d[:]) }

// MarshalText gives the digest in lower-case hex.
func (d SHA1) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Bundler says which program made a bundle. It is not signed.
type Bundler struct{ Name, Version, Release string }

// Mapping is an entry of the block device mapping: a virtual name (ami, root,
// swap, ephemeral0 …) and the device it is to appear as.
type Mapping struct{ Virtual, Device string }

// ManifestPart names a part and the digest of its (encrypted) bytes.
type ManifestPart struct {
	Filename string
	SHA1     SHA1
}

// Kinds of image, the values of [Manifest.Type].
const (
	TypeMachine = "machine"
	TypeKernel  = "kernel"
	TypeRamdisk = "ramdisk"
)

// Manifest is what a bundle's manifest says. All of it but Version and
// Bundler is covered by the signature: believe it once
// [Manifest.VerifySignature] or [Manifest.CheckTrust] returned nil.
type Manifest struct {
	Version string  // not signed
	Bundler Bundler // not signed

	Arch               string // i386, x86_64, arm64 …; version 3 knows i386 only
	BlockDeviceMapping []Mapping
	KernelID           string
	RamdiskID          string
	ProductCodes       []string

	Name        string // of the bundle; a valid file name
	Account     string // owner's account id
	Type        string // TypeMachine unless said otherwise
	KernelName  string
	Ancestors   []string // AMI ids
	Digest      SHA1     // of the whole archive (tar stream) before compression
	Size        int64    // bytes of the image
	BundledSize int64    // sum of the parts' bytes

	// Key and IV, as 32 hex digits each, encrypted with the cloud's and the
	// user's RSA key. Those of the user may be absent.
	EC2Key, EC2IV   []byte
	UserKey, UserIV []byte

	Parts []ManifestPart

	Signature []byte // nil if the manifest says UNSIGNED

	signed     []byte // the bytes the signature is over
	hasMachine bool   // there is a <machine_configuration>
}

// IsSigned tells whether the manifest carries a signature, good or not.
func (m *Manifest) IsSigned() bool { return m.Signature != nil }

// ParseManifest reads a manifest of any version. It does not check the
// signature; but what it returns is exactly what the signature covers: the
// document is refused where another reader might see another one in it. Errors
// are [*Error] of class ErrFormat, ErrTruncated, ErrTooNew, ErrTooOld,
// ErrEncrypted, ErrSignature (none at all) or ErrLimit.
func ParseManifest(data []byte) (*Manifest, error) {
	if len(data) > maxManifest {
		return nil, fail(ErrLimit, objManifest, "is %d bytes long, more than %d", len(data), maxManifest)
	}
	if IsEncryptedManifest(data) {
		return nil, fail(ErrEncrypted, objManifest, "is itself encrypted (an old upload): it opens with the user's private key")
	}
	p := parser{scanner: scanner{b: data}, m: &Manifest{}}
	if err := p.document(); err != nil {
		return nil, err
	}
	return p.m, nil
}

type parser struct {
	scanner
	m       *Manifest
	machine []byte // raw slices
	image   []byte
}

func (p *parser) document() error {
	if err := p.declaration(); err != nil {
		return err
	}
	p.space()
	root, err := p.start()
	if err != nil {
		return err
	}
	if root.name != "manifest" || len(root.attrs) > 0 {
		return p.errorf("<manifest> expected, found <%s>", root.name)
	}
	var once seen
	var signature string
	err = p.children(root, func(e element) error {
		// The order is the format's: what a search for the first <image> finds
		// is then what is parsed, whatever else the file holds.
		if err := p.inOrder(&once, e, "version", "bundler", "machine_configuration", "image", "signature"); err != nil {
			return err
		}
		var err error
		switch e.name {
		case "version":
			p.m.Version, err = p.plain(e)
			if err == nil {
				err = checkVersion(p.m.Version)
			}
		case "bundler":
			err = p.bundler(e)
		case "machine_configuration":
			err = p.machineConfiguration(e)
			p.machine = p.b[e.at:p.at]
		case "image":
			err = p.imageElement(e)
			p.image = p.b[e.at:p.at]
		case "signature":
			signature, err = p.plain(e)
		}
		return err
	})
	if err != nil {
		return err
	}
	if rest := string(p.rest()); rest != "" && rest != "\n" && rest != "\r\n" {
		return p.errorf("%d bytes after </manifest>", len(rest))
	}
	if p.m.Version == "" || p.image == nil {
		return p.errorf("no <version> or no <image>")
	}
	m := p.m
	m.hasMachine = p.machine != nil
	if m.hasMachine == (m.Version == Version3) {
		return p.errorf("version %q and <machine_configuration> do not agree", m.Version)
	}
	if !m.hasMachine {
		m.Arch = "i386"
	}
	m.signed = append(append(make([]byte, 0, len(p.machine)+len(p.image)), p.machine...), p.image...)
	switch signature {
	case "":
		return fail(ErrSignature, objManifest, "has no signature")
	case unsignedMark:
		return nil
	}
	if m.Signature, err = p.hex(signature, "signature"); err != nil {
		return err
	}
	return nil
}

// unsignedMark stands for the signature where there is none (euca2ools).
const unsignedMark = "UNSIGNED"

// checkVersion knows every version there was. The text is not signed, so
// nothing but refusal may follow from it.
func checkVersion(v string) error {
	switch v {
	case Version20071010, "20071010", Version20070829, "2007-08-29", Version3:
		return nil
	}
	digits := ""
	for _, c := range v {
		switch {
		case c >= '0' && c <= '9':
			digits += string(c)
		case c != '-':
			return fail(ErrFormat, objManifest, "version %q", v)
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	switch {
	case err != nil:
		return fail(ErrFormat, objManifest, "version %q", v)
	case n > 20071010:
		return fail(ErrTooNew, objManifest, "version %q is newer than %s, the last one known", v, Version20071010)
	case n < 3:
		return fail(ErrTooOld, objManifest, "version %q is older than %s, the first one known", v, Version3)
	}
	return fail(ErrFormat, objManifest, "version %q is none that ever existed", v)
}

// seen keeps which elements of a container were there already.
type seen struct {
	names map[string]bool
	last  int
}

func (p *parser) once(s *seen, e element) error {
	if s.names[e.name] {
		return p.errorf("<%s> a second time", e.name)
	}
	if s.names == nil {
		s.names = make(map[string]bool)
	}
	s.names[e.name] = true
	return nil
}

func (p *parser) inOrder(s *seen, e element, order ...string) error {
	if err := p.once(s, e); err != nil {
		return err
	}
	for i, name := range order {
		if name != e.name {
			continue
		}
		if i < s.last {
			return p.errorf("<%s> in the wrong place", e.name)
		}
		s.last = i
		return nil
	}
	return p.unknown(e)
}

func (p *parser) unknown(e element) error { return p.errorf("unknown element <%s>", e.name) }

func (p *parser) tooMany(e element) error {
	return fail(ErrLimit, objManifest, "<%s> has more than %d entries", e.name, maxList)
}

// plain is the text of an element that may have no attributes.
func (p *parser) plain(e element) (string, error) {
	if len(e.attrs) > 0 {
		return "", p.errorf("<%s> has an attribute %s", e.name, e.attrs[0].name)
	}
	return p.text(e)
}

// withAttr is the text of an element that must have exactly name=value.
func (p *parser) withAttr(e element, name, value string) (string, error) {
	if len(e.attrs) != 1 || e.attrs[0] != (attr{name, value}) {
		return "", p.errorf("<%s> without %s=%q", e.name, name, value)
	}
	return p.text(e)
}

func (p *parser) number(text, what string) (int64, error) {
	// Canonical decimal below 10^18: no sign, no leading zero, no overflow.
	ok := len(text) > 0 && len(text) <= 18 && (text[0] != '0' || len(text) == 1)
	for _, c := range []byte(text) {
		ok = ok && c >= '0' && c <= '9'
	}
	if !ok {
		return 0, p.errorf("%s %q is not a number", what, shorten(text))
	}
	return strconv.ParseInt(text, 10, 64)
}

func shorten(s string) string {
	if len(s) > 60 {
		return s[:60] + "…"
	}
	return s
}

// hex decodes lower-case hex; upper case would be a second spelling of the
// same (the signature's own bytes are not signed).
func (p *parser) hex(text, what string) ([]byte, error) {
	for _, c := range []byte(text) {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f') {
			return nil, p.errorf("%s is not lower-case hex", what)
		}
	}
	b, err := hex.DecodeString(text)
	if err != nil {
		return nil, p.errorf("%s is not hex: %v", what, err)
	}
	return b, nil
}

func (p *parser) sha1(e element) (d SHA1, err error) {
	text, err := p.withAttr(e, "algorithm", "SHA1")
	if err != nil {
		return d, err
	}
	b, err := p.hex(text, "digest")
	if err != nil {
		return d, err
	}
	if len(b) != len(d) {
		return d, p.errorf("digest of %d bytes where SHA-1 has %d", len(b), len(d))
	}
	copy(d[:], b)
	return d, nil
}

// list reads the elements called name within e.
func (p *parser) list(e element, name string) (texts []string, err error) {
	if len(e.attrs) > 0 {
		return nil, p.errorf("<%s> has attributes", e.name)
	}
	err = p.children(e, func(c element) error {
		if c.name != name {
			return p.unknown(c)
		}
		t, err := p.plain(c)
		if texts = append(texts, t); len(texts) > maxList {
			return p.tooMany(e)
		}
		return err
	})
	return texts, err
}
