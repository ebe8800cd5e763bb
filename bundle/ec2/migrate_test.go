package ec2

import (
	"errors"
	"os"
	"testing"
)

// The real tool's own result must come out to the byte: signing is
// deterministic and the key material is carried over.
func TestMigrateLikeThePeer(t *testing.T) {
	user := loadParty(t, "user")
	old := readManifest(t, fixture("ec2-migrated", "web-1.0.manifest.xml.bak"))
	want, err := os.ReadFile(fixture("ec2-migrated", "web-1.0.manifest.xml"))
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := ParseManifest(want)
	if err != nil {
		t.Fatal(err)
	}
	_, doc, err := Migrate(old, MigrateOptions{Key: user.key, KernelID: theirs.KernelID, RamdiskID: theirs.RamdiskID})
	if err != nil {
		t.Fatal(err)
	}
	if string(doc) != string(want) {
		t.Errorf("migrated to\n%s\nwant\n%s", doc, want)
	}
}

func TestMigrateToAnotherCloud(t *testing.T) {
	user, oldCloud := loadParty(t, "user"), loadParty(t, "ec2")
	newCloud := user // any other RSA key will do as the new cloud's
	for _, path := range []string{
		fixture("ec2-basic", "fx.img.manifest.xml"), fixture("euca-basic", "fx.img.manifest.xml"),
		fixture("old-manifests", "v3.manifest.xml"), fixture("old-manifests", "v20070829.manifest.xml"),
	} {
		old := readManifest(t, path)
		m, doc, err := Migrate(old, MigrateOptions{Key: user.key, EC2Cert: newCloud.cert, KeepIDs: true})
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseManifest(doc)
		if err != nil {
			t.Fatal(err)
		}
		if err := got.VerifySignature(user.pub()); err != nil {
			t.Error(err)
		}
		if got.Version != Version20071010 || got.Bundler != old.Bundler || got.Digest != old.Digest || got.Arch != old.Arch || len(got.Parts) != len(m.Parts) {
			t.Errorf("%s: migrated to %+v", path, got)
		}
		key, iv, _, err := old.sessionKey(user.key)
		if err != nil {
			t.Fatal(err)
		}
		got.UserKey, got.UserIV = nil, nil // leave the cloud's side only
		k2, iv2, side, err := got.sessionKey(newCloud.key)
		if err != nil || side != SideCloud || k2 != key || iv2 != iv {
			t.Errorf("%s: the new cloud finds another key: %v", path, err)
		}
		if _, _, _, err := got.sessionKey(oldCloud.key); !errors.Is(err, ErrKey) {
			t.Errorf("%s: the old cloud still opens it: %v", path, err)
		}
	}
}

func TestMigrateRefuses(t *testing.T) {
	user, cloud := loadParty(t, "user"), loadParty(t, "ec2")
	m := readManifest(t, fixture("ec2-basic", "fx.img.manifest.xml"))
	if _, _, err := Migrate(m, MigrateOptions{Key: cloud.key}); !errors.Is(err, ErrSignature) {
		t.Errorf("signed by somebody else: %v, want ErrSignature", err)
	}
	if _, _, err := Migrate(m, MigrateOptions{}); !errors.Is(err, ErrOption) {
		t.Errorf("no key: %v, want ErrOption", err)
	}
	unsigned := *m
	unsigned.Signature = nil
	if _, _, err := Migrate(&unsigned, MigrateOptions{Key: user.key}); !errors.Is(err, ErrUnsigned) {
		t.Errorf("unsigned: %v, want ErrUnsigned", err)
	}
}
