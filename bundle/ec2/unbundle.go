package ec2

import (
	"context"
	"crypto/rsa"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/instar-image/instar/bundle/sparse"
	"github.com/instar-image/instar/internal/durable"
)

// UnbundleOptions say how a bundle is opened and whose bundles are believed.
type UnbundleOptions struct {
	// Key is the user's or the cloud's private key; required.
	Key *rsa.PrivateKey
	// Trust are the keys that manifests may be signed with. If there are none,
	// the public half of Key has to be it: right for the user's key, never for
	// the cloud's.
	Trust []*rsa.PublicKey
	// AllowUnsigned accepts a manifest that says UNSIGNED.
	AllowUnsigned bool
	// SpoolDir is where parts that do not fit in memory (48 MiB for all that
	// are underway) are kept meanwhile, in unlinked files. "" means os.TempDir.
	SpoolDir string
}

func (o *UnbundleOptions) trust() Trust {
	t := Trust{Keys: o.Trust, AllowUnsigned: o.AllowUnsigned}
	if len(t.Keys) == 0 && o.Key != nil {
		t.Keys = []*rsa.PublicKey{&o.Key.PublicKey}
	}
	return t
}

// checkTrust checks m's signature under o.
func (o *UnbundleOptions) checkTrust(m *Manifest) (*rsa.PublicKey, error) {
	signer, err := m.CheckTrust(o.trust())
	if err != nil && len(o.Trust) == 0 && o.Key != nil && m.IsSigned() {
		return nil, &Error{Class: ErrSignature, Object: objManifest, Detail: "was not signed with the private key given; to open it with the cloud's key or another recipient's, give the certificate of its signer", Err: err}
	}
	return signer, err
}

// open checks the signature, then recovers the key of the parts.
func (o *UnbundleOptions) open(m *Manifest) (key, iv BlockKey, err error) {
	if o.Key == nil {
		return key, iv, fail(ErrOption, "private key", "none given")
	}
	if _, err = o.checkTrust(m); err != nil {
		return key, iv, err
	}
	key, iv, _, err = m.sessionKey(o.Key)
	return key, iv, err
}

// Unbundle writes the image of the bundle to out, which is to be empty. The
// signature is checked before anything else, each part's digest before any of
// it is decrypted, the archive's digest and all sizes at the end: what out has
// been given is good once Unbundle returned nil, and has to be thrown away if
// it did not. Errors about the bundle are [*Error]; those of src and out are
// wrapped.
func Unbundle(ctx context.Context, o UnbundleOptions, m *Manifest, src PartSource, out Output) error {
	key, iv, err := o.open(m)
	if err != nil {
		return err
	}
	if err := decodeParts(ctx, m, key, iv, newFetcher(m, src, o.SpoolDir), out); err != nil {
		return fmt.Errorf("unbundling %q: %w", m.Name, err)
	}
	return nil
}

func decodeParts(ctx context.Context, m *Manifest, key, iv BlockKey, f *fetcher, out Output) error {
	d := &decoder{key: key, iv: iv, size: m.Size, out: out}
	err := d.run(ctx, func(ctx context.Context, w io.Writer) error {
		var total int64
		err := f.each(ctx, func(_ int, p *fetched) error {
			total += p.size
			return p.writeTo(w)
		})
		if err == nil && total != m.BundledSize {
			err = fail(ErrSize, "parts", "have %d bytes in all, the manifest says %d", total, m.BundledSize)
		}
		return err
	})
	if err != nil {
		return err
	}
	if d.digest != m.Digest {
		return fail(ErrDigest, objArchive, "has SHA-1 %s, the manifest says %s", d.digest, m.Digest)
	}
	return finish(out, m.Size)
}

func finish(out Output, size int64) error {
	n, err := out.Finish()
	if err != nil {
		return fmt.Errorf("finishing the image: %w", err)
	}
	if n != size {
		return fmt.Errorf("finishing the image: %d bytes were written where %d were due", n, size)
	}
	return nil
}

// UnbundleFile writes the image to a file at path, sparse, mode 0600 less the
// umask. The file appears there, replacing any other, when all of it is
// verified and on disk; until then, and for good after an error, nothing does.
func UnbundleFile(ctx context.Context, o UnbundleOptions, m *Manifest, src PartSource, path string) error {
	if o.SpoolDir == "" {
		o.SpoolDir = filepath.Dir(path)
	}
	err := durable.Fill(path, 0o600, func(f *os.File) error {
		return Unbundle(ctx, o, m, src, sparse.NewWriter(f))
	})
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

// UnbundleTo writes the image to w, holes as zeros, for outputs that cannot
// take back what they got: a pipe, a terminal's far end. All is read twice:
// the first time everything is verified (see [Verify]) and nothing written;
// the second time each part is verified again before it is used.
func UnbundleTo(ctx context.Context, o UnbundleOptions, m *Manifest, src PartSource, w io.Writer) error {
	if err := Unbundle(ctx, o, m, src, &nowhere{}); err != nil {
		return err
	}
	return Unbundle(ctx, o, m, src, NewStreamOutput(w))
}

// UnbundleDevice writes the image over the block device (or existing file) f
// from its beginning, zeros included, and syncs it. All is read twice, as in
// [UnbundleTo]: a bundle that is not good does not touch the device.
func UnbundleDevice(ctx context.Context, o UnbundleOptions, m *Manifest, src PartSource, f *os.File) error {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("unbundling to %s: %w", f.Name(), err)
	}
	if isDevice(f) && size < m.Size {
		return fmt.Errorf("unbundling to %s: it has %d bytes, the image %d", f.Name(), size, m.Size)
	}
	if err := Unbundle(ctx, o, m, src, &nowhere{}); err != nil {
		return err
	}
	if err := Unbundle(ctx, o, m, src, NewDeviceOutput(f)); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("unbundling to %s: %w", f.Name(), err)
	}
	return nil
}

func isDevice(f *os.File) bool {
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeDevice != 0
}

// StreamOptions say how a bare ciphertext stream is opened.
type StreamOptions struct {
	Key, IV BlockKey
	Size    int64 // of the image; 0 if not known
	SHA1    *SHA1 // of the archive; nil if not known
}

// UnbundleStream decodes r, the concatenation of a bundle's parts, to out.
// There is no manifest, so nothing tells whether the stream is good until its
// end has come and, if given, size and digest agree: what out gets before
// UnbundleStream returned nil is not to be relied on.
func UnbundleStream(ctx context.Context, o StreamOptions, r io.Reader, out Output) error {
	d := &decoder{key: o.Key, iv: o.IV, size: o.Size, out: out}
	if o.Size <= 0 {
		d.size = -1
	}
	err := d.run(ctx, func(_ context.Context, w io.Writer) error { return copyChunks(w, r) })
	if err != nil {
		return fmt.Errorf("unbundling a stream: %w", err)
	}
	if o.SHA1 != nil && d.digest != *o.SHA1 {
		return fail(ErrDigest, objArchive, "has SHA-1 %s, expected was %s", d.digest, o.SHA1)
	}
	return finish(out, d.member.size)
}
