package chunked

import (
	"context"
	"crypto/sha256"
	"slices"
	"strings"
	"time"

	"github.com/instar-image/instar/bundle/keys"
)

// Manifest says what an image is, and what it is made of (SPEC.md §7.1).
type Manifest struct {
	Name               string       `json:"name"`
	Sequence           int64        `json:"sequence"` // of the head that publishes it
	Created            time.Time    `json:"created"`  // UTC, whole seconds
	Domain             string       `json:"domain"`
	Parent             Name         `json:"parent,omitzero"` // manifest of the same image, or none
	Description        string       `json:"description,omitempty"`
	Architecture       string       `json:"architecture"`
	Partition          string       `json:"partition"`
	Filesystem         string       `json:"filesystem"`
	RootDevice         string       `json:"root_device,omitempty"`
	BlockDeviceMapping []Mapping    `json:"block_device_mapping"`
	Streams            []Content    `json:"streams"` // ascending by name
	Cmdline            string       `json:"cmdline,omitempty"`
	Index              IndexRef     `json:"index"`
	Packs              []ObjectSize `json:"packs"` // ascending by name
	Data               int64        `json:"data"`
	Added              int64        `json:"added"`
	Tool               string       `json:"tool"`
}

// Mapping is one line of an EC2 block device mapping.
type Mapping struct {
	Virtual string `json:"virtual"`
	Device  string `json:"device"`
}

// Content is what a manifest says about a stream.
type Content struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256,omitempty"` // hex; of kernel and initrd, and only of them
}

// IndexRef names the objects of an index.
type IndexRef struct {
	Root     ObjectSize   `json:"root"`
	Segments []ObjectSize `json:"segments"` // ascending by name
}

// Names of streams.
const (
	StreamDisk   = "disk"
	StreamKernel = "kernel"
	StreamInitrd = "initrd"
	StreamLayout = "layout"
)

// OpenManifest verifies the manifest of an image, reads it and makes sure that
// it is that image's. Nothing of it is used before.
func OpenManifest(object []byte, trust *keys.AllowedSigners, image string) (*Manifest, *Verified, error) {
	m := &Manifest{}
	v, err := open(m, object, trust, image)
	if err != nil {
		return nil, nil, err
	}
	return m, v, nil
}

// ParseManifest reads a manifest's document, without its signature.
func ParseManifest(doc []byte) (*Manifest, error) {
	m := &Manifest{}
	if err := decode(m, doc); err != nil {
		return nil, err
	}
	return m, nil
}

// ReadManifestUnverified reads a signed manifest without asking who signed it:
// for garbage collection and scrubbing, which keep what anybody refers to.
func ReadManifestUnverified(object []byte) (*Manifest, error) {
	m := &Manifest{}
	if err := readUnverified(m, object); err != nil {
		return nil, err
	}
	return m, nil
}

// Document gives the manifest's one encoding. ErrUsage if a field is not as it
// must be.
func (m *Manifest) Document() ([]byte, error) { return encode(m) }

// Sign gives the signed manifest, whose name is [NameOf] it.
func (m *Manifest) Sign(ctx context.Context, s keys.Signer) ([]byte, error) { return sign(ctx, m, s) }

func (m *Manifest) format() string             { return NamespaceImage }
func (m *Manifest) limit() int                 { return MaxManifest }
func (m *Manifest) about() (string, time.Time) { return m.Name, m.Created }

func (m *Manifest) fields(f *form) {
	f.text("name", &m.Name)
	f.number("sequence", &m.Sequence)
	f.time("created", &m.Created)
	f.text("domain", &m.Domain)
	if f.present("parent", m.Parent != Name{}) {
		f.name("parent", &m.Parent)
	}
	f.optional("description", &m.Description)
	f.text("architecture", &m.Architecture)
	f.text("partition", &m.Partition)
	f.text("filesystem", &m.Filesystem)
	f.optional("root_device", &m.RootDevice)
	objects(f, "block_device_mapping", &m.BlockDeviceMapping, func(d *Mapping) {
		f.text("virtual", &d.Virtual)
		f.text("device", &d.Device)
	})
	objects(f, "streams", &m.Streams, func(s *Content) {
		f.text("name", &s.Name)
		f.number("size", &s.Size)
		f.optional("sha256", &s.SHA256)
	})
	f.optional("cmdline", &m.Cmdline)
	f.object("index", func() {
		f.object("root", func() { f.objectSize(&m.Index.Root) })
		objects(f, "segments", &m.Index.Segments, f.objectSize)
	})
	objects(f, "packs", &m.Packs, f.objectSize)
	f.number("data", &m.Data)
	f.number("added", &m.Added)
	f.text("tool", &m.Tool)
}

func (m *Manifest) check() error {
	for _, f := range []func() error{
		func() error { return CheckImageName(m.Name) },
		func() error { return checkNumber("sequence", m.Sequence, 1, maxNumber) },
		func() error { return checkTime("created", m.Created) },
		func() error { return CheckDomainName(m.Domain) },
		func() error { return checkText("description", m.Description, 0, 255) },
		m.checkMachine,
		m.checkStreams,
		m.checkObjects,
		func() error { return checkText("tool", m.Tool, 1, 128) },
	} {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

const maxMappings = 256

func (m *Manifest) checkMachine() error {
	switch {
	case !slices.Contains([]string{"x86_64", "arm64", "i386"}, m.Architecture):
		return wrong("architecture %q is none of x86_64, arm64, i386", clip(m.Architecture))
	case !slices.Contains([]string{"none", "mbr", "gpt"}, m.Partition):
		return wrong("partition %q is none of none, mbr, gpt", clip(m.Partition))
	case len(m.Filesystem) < 1 || len(m.Filesystem) > 32 || strings.Trim(m.Filesystem, "abcdefghijklmnopqrstuvwxyz0123456789_") != "":
		return wrong("filesystem %q is not 1 to 32 of a-z 0-9 _", clip(m.Filesystem))
	case m.RootDevice != "" && !isDevice(m.RootDevice):
		return wrong("root_device %q is not /dev/… in printable ASCII without blanks and quotes", clip(m.RootDevice))
	case len(m.BlockDeviceMapping) > maxMappings:
		return wrong("%d block device mappings are more than %d", len(m.BlockDeviceMapping), maxMappings)
	}
	for _, d := range m.BlockDeviceMapping {
		if err := checkText("virtual device", d.Virtual, 1, 255); err != nil {
			return err
		}
		if err := checkText("device", d.Device, 1, 255); err != nil {
			return err
		}
	}
	return nil
}

func isDevice(s string) bool {
	rest, ok := strings.CutPrefix(s, "/dev/")
	return ok && rest != "" && len(s) <= 255 &&
		!strings.ContainsFunc(rest, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\'' || r == '\\' })
}

const maxStreams = 64

func (m *Manifest) checkStreams() error {
	if len(m.Streams) > maxStreams {
		return wrong("%d streams are more than %d", len(m.Streams), maxStreams)
	}
	var has []string
	total := int64(0)
	for i, s := range m.Streams {
		boot := s.Name == StreamKernel || s.Name == StreamInitrd
		switch {
		case !isStreamName(s.Name):
			return wrong("stream %q: a name is 1 to 64 of a-z 0-9 -", clip(s.Name))
		case i > 0 && s.Name <= m.Streams[i-1].Name:
			return wrong("streams do not ascend at %q", s.Name)
		case s.Size < 0 || s.Size > maxNumber-total:
			return wrong("stream %q has %d bytes: all together have at most %d", s.Name, s.Size, int64(maxNumber))
		case boot && !isHex(s.SHA256, sha256.Size):
			return wrong("stream %q: sha256 %q is not 64 hex digits", s.Name, clip(s.SHA256))
		case !boot && s.SHA256 != "":
			return wrong("stream %q has a sha256, which only kernel and initrd have", s.Name)
		}
		total += s.Size
		has = append(has, s.Name)
	}
	switch {
	case !slices.Contains(has, StreamDisk):
		return wrong("there is no stream %q", StreamDisk)
	case slices.Contains(has, StreamInitrd) && !slices.Contains(has, StreamKernel):
		return wrong("there is an initrd without a kernel")
	case m.Cmdline != "" && !slices.Contains(has, StreamKernel):
		return wrong("there is a cmdline without a kernel")
	}
	if err := checkText("cmdline", m.Cmdline, 0, 4095); err != nil {
		return err
	}
	return checkNumber("data", m.Data, 0, total)
}

func (m *Manifest) checkObjects() error {
	root := m.Index.Root
	if err := checkNumber("size of the index root", root.Size, minSealedChunk, MaxStoredRoot); err != nil {
		return err
	}
	if err := checkSizes("segments", m.Index.Segments, minSealedChunk, maxStoredSegment); err != nil {
		return err
	}
	if err := checkSizes("packs", m.Packs, minPack, MaxPack); err != nil {
		return err
	}
	if slices.ContainsFunc(m.Index.Segments, func(o ObjectSize) bool { return o.Name == root.Name }) {
		return wrong("the index root is among the segments")
	}
	if m.Data > 0 && (len(m.Index.Segments) == 0 || len(m.Packs) == 0) {
		return wrong("there is data, but no segment or no pack")
	}
	total := int64(0)
	for _, p := range m.Packs {
		total += p.Size
	}
	return checkNumber("added", m.Added, 0, total)
}

// Stream is what the manifest says about the stream with this name.
func (m *Manifest) Stream(name string) (Content, bool) {
	for _, s := range m.Streams {
		if s.Name == name {
			return s, true
		}
	}
	return Content{}, false
}

// CheckRoot makes sure that an index is the one the manifest describes: of the
// same streams and segments. Else what the manifest says, to people, to garbage
// collection and to whoever hands out access, would not be what is read.
func (m *Manifest) CheckRoot(r *Root) error {
	object := "index root " + m.Index.Root.Name.String()
	if len(r.Streams) != len(m.Streams) {
		return bad(ErrFormat, object, "it has %d streams, its manifest %d", len(r.Streams), len(m.Streams))
	}
	listed := make(map[Name]int64, len(m.Index.Segments))
	for _, o := range m.Index.Segments {
		listed[o.Name] = o.Size
	}
	used := make(map[Name]struct{}, len(listed))
	for i, s := range r.Streams {
		if want := m.Streams[i]; s.Name != want.Name || s.Size != want.Size {
			return bad(ErrFormat, object, "its stream %q has %d bytes; in its manifest %q has %d", s.Name, s.Size, want.Name, want.Size)
		}
		for _, g := range s.Segments {
			if size, ok := listed[g.Name]; !ok || size != int64(g.Stored) {
				return bad(ErrFormat, object, "its segment %s is not in its manifest", g.Name)
			}
			used[g.Name] = struct{}{}
		}
	}
	if len(used) != len(listed) {
		return bad(ErrFormat, object, "its manifest lists %d segments, of which it uses %d", len(listed), len(used))
	}
	return nil
}

func isStreamName(s string) bool {
	return len(s) >= 1 && len(s) <= 64 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}
