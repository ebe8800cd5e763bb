package ec2

import (
	"crypto/rsa"
	"errors"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestFixturesOpen(t *testing.T) {
	user, cloud := loadParty(t, "user"), loadParty(t, "ec2")
	for _, c := range []struct {
		name, manifest, parts string
	}{
		{"ec2-basic", fixture("ec2-basic", "fx.img.manifest.xml"), fixture("ec2-basic")},
		{"ec2-full", fixture("ec2-full", "web-1.0.manifest.xml"), fixture("ec2-full")},
		{"ec2-migrated", fixture("ec2-migrated", "web-1.0.manifest.xml"), fixture("ec2-full")},
		{"euca-basic", fixture("euca-basic", "fx.img.manifest.xml"), fixture("euca-basic")},
		{"version 3", fixture("old-manifests", "v3.manifest.xml"), fixture("ec2-basic")},
		{"version 2007-08-29", fixture("old-manifests", "v20070829.manifest.xml"), fixture("ec2-basic")},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := readManifest(t, c.manifest)
			for side, o := range map[string]UnbundleOptions{
				"user":            {Key: user.key},
				"user with trust": {Key: user.key, Trust: []*rsa.PublicKey{cloud.pub(), user.pub()}},
				"cloud":           {Key: cloud.key, Trust: []*rsa.PublicKey{user.pub()}},
			} {
				img, err := unbundleBytes(t, o, m, dirSource(c.parts))
				if err != nil {
					t.Fatalf("%s: %v", side, err)
				}
				if got := sha256Hex(img); got != fixtureSHA256 {
					t.Errorf("%s: image has SHA-256 %s, want %s", side, got, fixtureSHA256)
				}
			}
			if _, err := unbundleBytes(t, UnbundleOptions{Key: cloud.key}, m, dirSource(c.parts)); !errors.Is(err, ErrSignature) {
				t.Errorf("the cloud's key without trust: %v, want ErrSignature", err)
			}
			r, err := Verify(t.Context(), VerifyOptions{UnbundleOptions: UnbundleOptions{Key: user.key}}, m, dirSource(c.parts))
			if err != nil || !r.OK() || r.Archive != "good" || r.Signature != "good" || r.PartsGood != len(m.Parts) {
				t.Errorf("Verify: %+v, %v", r, err)
			}
		})
	}
}

func TestManifestFields(t *testing.T) {
	m := readManifest(t, fixture("ec2-full", "web-1.0.manifest.xml"))
	m.Parts = m.Parts[12:]
	want := &Manifest{
		Version: "2007-10-10", Bundler: Bundler{"ec2-ami-tools", "1.5", "3"}, Arch: "i386",
		BlockDeviceMapping: []Mapping{{"ami", "sda1"}, {"ephemeral0", "sdb"}, {"root", "/dev/sda1"}, {"swap", "sda3"}},
		KernelID:           "aki-12345678", RamdiskID: "ari-87654321", ProductCodes: []string{"774F4FF8,ABCD1234"},
		Name: "web-1.0", Account: "123456789012", Type: TypeMachine, Size: 8388608, BundledSize: 202768,
	}
	opts := cmp.Options{
		cmpopts.IgnoreUnexported(Manifest{}),
		cmpopts.IgnoreFields(Manifest{}, "EC2Key", "EC2IV", "UserKey", "UserIV", "Signature", "Digest", "Parts"),
	}
	if d := cmp.Diff(want, m, opts); d != "" {
		t.Error(d)
	}
	if p := m.Parts[0]; p.Filename != "web-1.0.part.12" || p.SHA1.String() != "1674e449fb2a77df6db8c783f1d4dd86f73953df" {
		t.Errorf("part 12 is %+v", p)
	}
}

func TestEncryptedManifest(t *testing.T) {
	user, cloud := loadParty(t, "user"), loadParty(t, "ec2")
	data, err := os.ReadFile(fixture("old-manifests", "encrypted-v2.manifest"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseManifest(data); !errors.Is(err, ErrEncrypted) {
		t.Errorf("parsing it as it is: %v, want ErrEncrypted", err)
	}
	doc, err := DecryptManifest(data, user.key)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(fixture("ec2-basic", "fx.img.manifest.xml"))
	if err != nil {
		t.Fatal(err)
	}
	if string(doc) != string(want) {
		t.Error("decrypts to another document than the one it was made from")
	}
	if _, err := DecryptManifest(data, cloud.key); !errors.Is(err, ErrKey) {
		t.Errorf("the cloud's key: %v, want ErrKey", err)
	}
}
