package catalog

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/stored"
	"github.com/instar-image/instar/upload/images"
)

// maxManifest is how many bytes of an EC2 bundle's manifest are read.
const maxManifest = 16 << 20

// Facts are what an image says of itself.
type Facts struct {
	Kind         Kind
	Location     string // in its one form
	Digest       string // hex SHA-256 of the manifest object
	Signer       string // "" if the signature was not checked
	Size         int64
	Stored       int64
	Added        int64
	Architecture string
	Type         string
	Description  string
	RootDevice   string
	Virtual      string // virtualization type
	Kernel       string
	Ramdisk      string
	Codes        []ProductCode
	Devices      []BlockDevice
	Ancestor     string    // image id it was made from
	Made         time.Time // when its manifest was made, as that says; zero for a bundle
}

// Inspect fetches what lies at a location and checks it: an EC2 bundle's
// manifest (BUCKET/PREFIX/NAME.manifest.xml), whose parts must all be there, or
// a version of an Instar image of this store (IMAGE, IMAGE@DIGITS,
// IMAGE@parent), whose signature must be right. What is wrong with it is
// InvalidManifest.
func (c *Catalog) Inspect(ctx context.Context, location string) (*Facts, error) {
	if err := checkText("location", location, 1, 2048); err != nil {
		return nil, &Error{Code: CodeManifest, Message: "The image location is not one", Err: err}
	}
	if !strings.Contains(location, "/") {
		return c.inspectInstar(ctx, strings.TrimPrefix(location, "instar:"), images.ResolveOptions{})
	}
	return c.inspectBundle(ctx, strings.TrimPrefix(location, "/"))
}

func (c *Catalog) inspectInstar(ctx context.Context, ref string, o images.ResolveOptions) (*Facts, error) {
	if c.opt.Images == nil {
		return nil, refuse(CodeManifest, "Instar images are not registered here: %q", clip(ref))
	}
	if _, err := images.ParseRef(ref); err != nil {
		return nil, &Error{Code: CodeManifest, Message: "The image location is neither BUCKET/…/NAME.manifest.xml nor an Instar image", Err: err}
	}
	img, err := c.opt.Images.Resolve(ctx, ref, o)
	if err != nil {
		return nil, asManifest(ctx, err)
	}
	m := img.Manifest
	f := &Facts{
		Kind: KindInstar, Location: m.Name + "@" + img.Name.String(), Digest: img.Name.String(), Signer: keys.Fingerprint(img.Signer),
		Architecture: m.Architecture, Type: "machine", Description: m.Description, RootDevice: m.RootDevice, Virtual: "hvm", Added: m.Added,
		Made: m.Created, Stored: images.Version{Manifest: m}.Stored(),
	}
	for _, s := range m.Streams {
		if s.Name == chunked.StreamDisk {
			f.Size = s.Size
		}
	}
	for _, b := range m.BlockDeviceMapping {
		f.add(b.Virtual, b.Device)
	}
	return f, nil
}

// add takes a line of a block device mapping. The root and the image itself are
// no devices of it.
func (f *Facts) add(virtual, device string) {
	switch virtual {
	case "ami":
	case "root":
		if f.RootDevice == "" {
			f.RootDevice = device
		}
	default:
		f.Devices = append(f.Devices, BlockDevice{Device: device, Virtual: virtual})
	}
}

// SplitBundle takes a bundle's location apart: the bucket, and the key of the
// manifest in it.
func SplitBundle(location string) (bucket, key string, err error) {
	bucket, key, ok := strings.Cut(location, "/")
	if !ok || CheckBucket(bucket) != nil || !strings.HasSuffix(key, ".xml") || upload.CheckKey(key) != nil {
		return "", "", refuse(CodeManifest, "The image location %q is not BUCKET/PREFIX/NAME.manifest.xml", clip(location))
	}
	return bucket, key, nil
}

// CheckBucket says whether a bucket may have the name: one that is also the name
// of a directory, for buckets that are directories, and leads nowhere else.
func CheckBucket(name string) error {
	bucket, prefix, err := upload.SplitLocation(name)
	if err == nil && (bucket != name || prefix != "") {
		err = fmt.Errorf("bucket %q: the name has a slash", clip(name))
	}
	if err == nil {
		err = upload.CheckKey(bucket)
	}
	if err == nil {
		err = checkText("the bucket's name", name, 1, 255)
	}
	if err != nil {
		return &Error{Code: CodeParameterValue, Message: "That is no bucket's name", Err: err}
	}
	return nil
}

// bundle reads and parses a bundle's manifest.
func (c *Catalog) bundle(ctx context.Context, location string, use func(bucket upload.Store, key string, data []byte, m *ec2.Manifest) error) (err error) {
	bucket, key, err := SplitBundle(location)
	if err != nil {
		return err
	}
	if c.opt.Bucket == nil {
		return refuse(CodeManifest, "EC2 bundles are not registered here: %q", clip(location))
	}
	s, err := c.opt.Bucket(ctx, bucket)
	if err != nil {
		return asManifest(ctx, err)
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	data, _, err := upload.GetBytes(ctx, s, key, maxManifest)
	if err != nil {
		return asManifest(ctx, err)
	}
	m, err := ec2.ParseManifest(data)
	if err != nil {
		return &Error{Code: CodeManifest, Message: "The manifest at " + location + " is not usable", Err: err}
	}
	return use(s, key, data, m)
}

func (c *Catalog) inspectBundle(ctx context.Context, location string) (*Facts, error) {
	var f *Facts
	err := c.bundle(ctx, location, func(s upload.Store, key string, data []byte, m *ec2.Manifest) error {
		if _, err := partSizes(ctx, s, path.Dir(key), m); err != nil {
			return err
		}
		sum := sha256.Sum256(data)
		f = &Facts{
			Kind: KindBundle, Location: location, Digest: hex.EncodeToString(sum[:]), Size: m.Size, Stored: m.BundledSize,
			Architecture: m.Arch, Type: m.Type, Kernel: m.KernelID, Ramdisk: m.RamdiskID,
		}
		if len(m.Ancestors) > 0 {
			f.Ancestor = m.Ancestors[len(m.Ancestors)-1]
		}
		for _, code := range m.ProductCodes {
			f.Codes = append(f.Codes, ProductCode{Code: code, Type: "devpay"})
		}
		for _, b := range m.BlockDeviceMapping {
			f.add(b.Virtual, b.Device)
		}
		return nil
	})
	return f, err
}

// partSizes makes sure that all parts are stored, with the bytes they have
// together, and gives each one's by its key.
func partSizes(ctx context.Context, s upload.Store, folder string, m *ec2.Manifest) (map[string]int64, error) {
	// Whatever else lies in the folder, and however much, is not kept.
	sizes := make(map[string]int64, len(m.Parts))
	for _, p := range m.Parts {
		sizes[partKey(folder, p.Filename)] = -1
	}
	for o, err := range s.List(ctx, partKey(folder, "")) {
		if err != nil {
			return nil, asManifest(ctx, err)
		}
		if _, ok := sizes[o.Key]; ok {
			sizes[o.Key] = o.Size
		}
	}
	var total int64
	for _, p := range m.Parts {
		size := sizes[partKey(folder, p.Filename)]
		if size < 0 {
			return nil, refuse(CodeManifest, "The part %q is missing", p.Filename)
		}
		total += size
	}
	if total != m.BundledSize {
		return nil, refuse(CodeManifest, "The parts have %d bytes in all, the manifest says %d", total, m.BundledSize)
	}
	return sizes, nil
}

func partKey(folder, name string) string {
	if folder == "." || folder == "" {
		return name
	}
	return folder + "/" + name
}

// asManifest tells what is wrong with an image from what is wrong with the store,
// or this machine: a refusal is for good, and what may pass is none.
func asManifest(ctx context.Context, err error) error {
	if ctx.Err() != nil || isRefusal(err) {
		return err
	}
	for _, e := range []error{
		upload.ErrNotExist, upload.ErrTooLarge, upload.ErrKey, upload.ErrCorrupt, upload.ErrNoBucket,
		images.ErrNoImage, images.ErrUnfit, images.ErrDamaged, stored.ErrDamaged, stored.ErrFormat,
		chunked.ErrCorrupt, chunked.ErrFormat, chunked.ErrVersion, chunked.ErrMissing, chunked.ErrForeign, chunked.ErrLimit,
		chunked.ErrOther, chunked.ErrDeleted,
		keys.ErrSignature, keys.ErrNamespace, keys.ErrKeyType, keys.ErrUntrusted, keys.ErrExpired, keys.ErrWrapped,
	} {
		if errors.Is(err, e) {
			return &Error{Code: CodeManifest, Message: "The image cannot be used", Err: err}
		}
	}
	return fmt.Errorf("look at the image: %w", err)
}

// inspectAsked is Inspect for whoever waits for the answer and may ask again: what he
// named and may not be read now is refused as well.
func (c *Catalog) inspectAsked(ctx context.Context, location string) (*Facts, error) {
	f, err := c.Inspect(ctx, location)
	if err == nil || ctx.Err() != nil || isRefusal(err) {
		return f, err
	}
	for _, e := range []error{upload.ErrAccess, upload.ErrBucketElsewhere, chunked.ErrRollback, chunked.ErrForked, chunked.ErrStale} {
		if errors.Is(err, e) {
			return nil, &Error{Code: CodeManifest, Message: "The image cannot be used", Err: err}
		}
	}
	return nil, err
}

func isNoCatalog(err error) bool { return errors.Is(err, ErrNoCatalog) }

// architectures are EC2's names for those of manifests.
var architectures = map[string]string{"aarch64": "arm64", "amd64": "x86_64", "i486": "i386", "i586": "i386", "i686": "i386"}

// fill gives a record what its maker left out. Location, kind, digest and sizes
// are the image's own word.
func (f *Facts) fill(m *Image) {
	m.Kind, m.Location, m.Digest, m.Signer, m.Size, m.Stored, m.Added = f.Kind, f.Location, f.Digest, f.Signer, f.Size, f.Stored, f.Added
	set := func(s *string, to string) {
		if *s == "" {
			*s = to
		}
	}
	arch := f.Architecture
	if a, ok := architectures[arch]; ok {
		arch = a
	}
	set(&m.Architecture, arch)
	set(&m.Type, f.Type)
	set(&m.RootDeviceName, f.RootDevice)
	set(&m.VirtualizationType, f.Virtual)
	set(&m.Kernel, f.Kernel)
	set(&m.Ramdisk, f.Ramdisk)
	set(&m.SourceImage, f.Ancestor)
	if len([]byte(f.Description)) <= maxDescription {
		set(&m.Description, f.Description)
	}
	m.RootDeviceType = "instance-store"
	if m.ProductCodes == nil {
		m.ProductCodes = f.Codes
	}
	// The caller's word wins, device by device; a device he leaves out is gone.
	said := map[string]bool{}
	for _, b := range m.BlockDevices {
		said[b.Device] = true
	}
	for _, b := range f.Devices {
		if !said[b.Device] {
			m.BlockDevices = append(m.BlockDevices, b)
		}
	}
}
