package catalog

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Limits on what a record holds.
const (
	maxTags        = 50
	maxDescription = 255
	maxGetStarted  = 64 << 10
	maxParameters  = 64
	maxFiles       = 32
	maxFile        = 64 << 10
	maxFilesTotal  = 256 << 10
	maxMappings    = 64
	maxShares      = 1000
)

var (
	imageID   = regexp.MustCompile(`^(ami|aki|ari)-[0-9a-f]{17}$`)
	otherID   = regexp.MustCompile(`^(ami|aki|ari)-[0-9a-f]{8}([0-9a-f]{9})?$`)
	keyPairIs = regexp.MustCompile(`^key-[0-9a-f]{17}$`)
	accountID = regexp.MustCompile(`^[0-9]{12}$`)
	imageName = regexp.MustCompile(`^[A-Za-z0-9()\[\] ./\-'@_]{3,128}$`)
	regionIs  = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	parameter = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,63}$`)
	fileMode  = regexp.MustCompile(`^0?[0-7]{3}$`)
	fileOwner = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}(:[a-z_][a-z0-9_-]{0,31})?$`)
	aliasIs   = regexp.MustCompile(`^[a-z][a-z0-9-]{0,62}$`)
	arnIs     = regexp.MustCompile(`^arn:[A-Za-z0-9:/_.-]{1,250}$`)
)

// CheckID says whether id has the form of an image's. The error is an [*Error]
// of code InvalidAMIID.Malformed.
func CheckID(id string) error {
	if !otherID.MatchString(id) {
		return refuse(CodeAMIMalformed, "Invalid id: %q (expecting \"ami-...\")", clip(id))
	}
	return nil
}

// CheckName says whether an image may have the name: InvalidAMIName.Malformed.
func CheckName(name string) error {
	if !imageName.MatchString(name) {
		return refuse(CodeAMINameMalformed, "AMI names must be between 3 and 128 characters long, and may contain letters, numbers, '(', ')', '.', '-', '/', '_', ''', '@', '[', ']' and blanks: %q does not comply", clip(name))
	}
	return nil
}

// CheckAccount says whether id is an account's: 12 digits.
func CheckAccount(id string) error {
	if !accountID.MatchString(id) {
		return refuse(CodeAMIAttribute, "Invalid account %q: it has 12 digits", clip(id))
	}
	return nil
}

// CheckRegion says whether name can be a region's: 1-63 of a-z 0-9 -.
func CheckRegion(name string) error {
	if !regionIs.MatchString(name) {
		return fmt.Errorf("region %q: not 1 to 63 of a-z, 0-9 and -", clip(name))
	}
	return nil
}

func clip(s string) string {
	if len(s) > 80 {
		return strings.ToValidUTF8(s[:80], "") + "…"
	}
	return s
}

// checkText is for what people read: no character moves the cursor, ends the
// line or turns the direction of writing.
func checkText(what, s string, least, most int) error {
	return checkLines(what, s, least, most, "")
}

func checkLines(what, s string, least, most int, allowed string) error {
	if len(s) < least || len(s) > most {
		return fmt.Errorf("%s has %d bytes, not %d to %d", what, len(s), least, most)
	}
	if !utf8.ValidString(s) {
		return fmt.Errorf("%s is not UTF-8", what)
	}
	for _, r := range s {
		if strings.ContainsRune(allowed, r) {
			continue
		}
		if unicode.IsControl(r) || r == '\u2028' || r == '\u2029' || r >= '\u202a' && r <= '\u202e' || r >= '\u2066' && r <= '\u2069' {
			return fmt.Errorf("%s holds the control character %U", what, r)
		}
	}
	return nil
}

func checkTime(what string, t time.Time) error {
	if t.Unix() < 1 || t.UTC().Year() > 9999 || t.Nanosecond() != 0 || t.Location() != time.UTC {
		return fmt.Errorf("%s is not a time in UTC and whole seconds after 1970", what)
	}
	return nil
}

func checkTimes(m map[string]time.Time) error {
	for what, t := range m {
		if !t.IsZero() {
			if err := checkTime(what, t); err != nil {
				return err
			}
		}
	}
	return nil
}

func oneOf(what, s string, of ...string) error {
	if !slices.Contains(of, s) {
		return fmt.Errorf("%s is %q, not one of %s", what, clip(s), strings.Join(of, ", "))
	}
	return nil
}

// check holds a record against FORMAT.md §5.
func (m *Image) check() error {
	if !imageID.MatchString(m.ID) {
		return fmt.Errorf("id %q", clip(m.ID))
	}
	if m.Revision < 1 || m.Revision > maxNumber {
		return fmt.Errorf("revision %d", m.Revision)
	}
	if m.Name != "" {
		if err := CheckName(m.Name); err != nil {
			return err
		}
	}
	for _, n := range []int64{m.Size, m.Stored, m.Added} {
		if n < 0 || n > maxNumber {
			return fmt.Errorf("a size of %d", n)
		}
	}
	err := errors.Join(
		CheckAccount(m.Owner),
		oneOf("state", string(m.State), string(Pending), string(Available), string(Failed), string(Disabled), string(Deregistered)),
		oneOf("kind", string(m.Kind), string(KindBundle), string(KindInstar), string(KindNone)),
		oneOf("architecture", m.Architecture, "i386", "x86_64", "arm64", "x86_64_mac", "arm64_mac"),
		oneOf("type", m.Type, "machine", "kernel", "ramdisk"),
		oneOf("platform", m.Platform, "", "windows"),
		oneOf("root device type", m.RootDeviceType, "instance-store", "ebs"),
		oneOf("virtualization type", m.VirtualizationType, "hvm", "paravirtual"),
		oneOf("hypervisor", m.Hypervisor, "xen", "ovm"),
		oneOf("boot mode", m.BootMode, "", "legacy-bios", "uefi", "uefi-preferred"),
		oneOf("TPM support", m.TpmSupport, "", "v2.0"),
		oneOf("IMDS support", m.ImdsSupport, "", "v2.0"),
		oneOf("SR-IOV support", m.SriovNetSupport, "", "simple"),
		oneOf("protection", m.Protection, "", "enabled-without-cooldown", "enabled-with-cooldown"),
		checkText("description", m.Description, 0, maxDescription),
		checkText("location", m.Location, 0, 2048),
		checkText("signer", m.Signer, 0, 255),
		checkText("platform details", m.PlatformDetails, 0, 255),
		checkText("usage operation", m.UsageOperation, 0, 255),
		checkText("root device name", m.RootDeviceName, 0, 255),
		checkText("UEFI data", m.UefiData, 0, 64<<10),
		checkText("kernel", m.Kernel, 0, 64), checkText("ramdisk", m.Ramdisk, 0, 64),
		checkText("source image", m.SourceImage, 0, 64),
		checkText("source region", m.SourceRegion, 0, 63),
		checkText("source instance", m.SourceInstance, 0, 64),
		checkText("source object", m.SourceObject, 0, 2048),
		checkText("reason", m.Reason.Code, 0, 128), checkText("reason", m.Reason.Message, 0, 1024),
		checkLines("getting started", m.GettingStarted, 0, maxGetStarted, "\n\t"),
		checkTime("created", m.Created),
		checkTimes(map[string]time.Time{
			"deprecated": m.Deprecated, "deregistered": m.Deregistered, "last launched": m.LastLaunched, "protected until": m.ProtectedUntil,
		}),
		m.Tags.check(),
	)
	if err != nil {
		return err
	}
	if m.Digest != "" && !isHex(m.Digest, 64) {
		return errors.New("digest is not 64 hex digits")
	}
	if (m.Kind == KindNone) != (m.Location == "") && m.State != Deregistered {
		return fmt.Errorf("kind %s with location %q", m.Kind, m.Location)
	}
	return errors.Join(m.checkLists(), checkParameters(m.Parameters), checkFiles(m.Files), m.checkHistory())
}

func (m *Image) checkLists() error {
	if len(m.BlockDevices) > maxMappings || len(m.ProductCodes) > maxMappings || len(m.BillingProducts) > maxMappings {
		return fmt.Errorf("more than %d block devices, product codes or billing products", maxMappings)
	}
	for _, b := range m.BlockDevices {
		if err := b.check(); err != nil {
			return err
		}
	}
	for _, p := range m.ProductCodes {
		if err := errors.Join(checkText("product code", p.Code, 1, 64), oneOf("product code's type", p.Type, "devpay", "marketplace")); err != nil {
			return err
		}
	}
	for _, p := range m.BillingProducts {
		if err := checkText("billing product", p, 1, 64); err != nil {
			return err
		}
	}
	for _, l := range []struct {
		what string
		list []string
		is   *regexp.Regexp
	}{{"account", m.LaunchAccounts, accountID}, {"organization", m.LaunchOrgs, arnIs}, {"organizational unit", m.LaunchOrgUnits, arnIs}} {
		if len(l.list) > maxShares {
			return fmt.Errorf("shared with more than %d", maxShares)
		}
		for i, s := range l.list {
			if !l.is.MatchString(s) {
				return fmt.Errorf("%s %q", l.what, clip(s))
			}
			if i > 0 && s <= l.list[i-1] {
				return fmt.Errorf("%ss do not ascend", l.what)
			}
		}
	}
	return nil
}

func (b *BlockDevice) check() error {
	if err := errors.Join(checkText("device", b.Device, 1, 255), checkText("virtual name", b.Virtual, 0, 255)); err != nil {
		return err
	}
	n := 0
	for _, is := range []bool{b.Virtual != "", b.NoDevice, b.EBS != nil} {
		if is {
			n++
		}
	}
	if n != 1 {
		return fmt.Errorf("block device %s: exactly one of a virtual name, a volume and no device", b.Device)
	}
	if e := b.EBS; e != nil {
		for _, v := range []int64{e.VolumeSize, e.IOPS, e.Throughput} {
			if v < 0 || v > 1<<30 {
				return fmt.Errorf("block device %s: a number of %d", b.Device, v)
			}
		}
		return errors.Join(checkText("snapshot", e.SnapshotID, 0, 64), checkText("KMS key", e.KmsKeyID, 0, 512),
			oneOf("volume type", e.VolumeType, "", "standard", "io1", "io2", "gp2", "gp3", "sc1", "st1"))
	}
	return nil
}

func (t Tags) check() error {
	if len(t) > maxTags {
		return fmt.Errorf("%d tags are more than %d", len(t), maxTags)
	}
	for k, v := range t {
		if utf8.RuneCountInString(k) > 127 || utf8.RuneCountInString(v) > 255 {
			return fmt.Errorf("tag %q: a key has at most 127 characters, a value 255", clip(k))
		}
		if err := errors.Join(checkText("tag key", k, 1, 508), checkText("tag value", v, 0, 1020)); err != nil {
			return err
		}
	}
	return nil
}

func checkParameters(l []Parameter) error {
	if len(l) > maxParameters {
		return fmt.Errorf("%d parameters are more than %d", len(l), maxParameters)
	}
	seen := map[string]bool{}
	for _, p := range l {
		if !parameter.MatchString(p.Name) || seen[p.Name] {
			return fmt.Errorf("parameter %q: not a name, or there twice", clip(p.Name))
		}
		seen[p.Name] = true
		err := errors.Join(oneOf("parameter's type", p.Type, "string", "integer", "boolean", "choice", "secret"),
			checkText("help", p.Help, 0, 1024), checkText("default", p.Default, 0, 4096))
		if err != nil {
			return fmt.Errorf("parameter %s: %w", p.Name, err)
		}
		if (p.Type == "choice") != (len(p.Choices) > 0) || len(p.Choices) > 64 {
			return fmt.Errorf("parameter %s: choices go with type choice, and are at most 64", p.Name)
		}
		for _, c := range p.Choices {
			if err := checkText("choice", c, 1, 255); err != nil {
				return fmt.Errorf("parameter %s: %w", p.Name, err)
			}
		}
		if p.Type == "secret" && p.Default != "" {
			return fmt.Errorf("parameter %s: a secret with a default would be none", p.Name)
		}
		if p.Default != "" {
			if err := p.Check(p.Default); err != nil {
				return fmt.Errorf("default of %w", err)
			}
		}
	}
	return nil
}

func checkFiles(l []File) error {
	if len(l) > maxFiles {
		return fmt.Errorf("%d files are more than %d", len(l), maxFiles)
	}
	total := 0
	seen := map[string]bool{}
	for _, f := range l {
		if !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" || seen[f.Path] {
			return fmt.Errorf("file %q: not an absolute path in its shortest form, or there twice", clip(f.Path))
		}
		seen[f.Path] = true
		if err := checkText("path", f.Path, 2, 1024); err != nil {
			return err
		}
		if f.Mode != "" && !fileMode.MatchString(f.Mode) || f.Owner != "" && !fileOwner.MatchString(f.Owner) {
			return fmt.Errorf("file %s: mode %q, owner %q", f.Path, clip(f.Mode), clip(f.Owner))
		}
		if total += len(f.Content); len(f.Content) > maxFile || total > maxFilesTotal {
			return fmt.Errorf("file %s: more than %d bytes, or %d in all", f.Path, maxFile, maxFilesTotal)
		}
		if f.Content == nil {
			return fmt.Errorf("file %s: no content", f.Path)
		}
	}
	return nil
}

func (m *Image) checkHistory() error {
	if len(m.History) > maxHistory {
		return fmt.Errorf("%d changes are more than %d", len(m.History), maxHistory)
	}
	for _, c := range m.History {
		err := errors.Join(checkTime("change", c.Time), checkText("action", c.Action, 1, 64), checkText("account", c.Account, 0, 12),
			checkText("by", c.By, 0, 255), checkText("detail", c.Detail, 0, 512))
		if err != nil {
			return err
		}
	}
	return nil
}

func (k *KeyPair) check() error {
	if !keyPairIs.MatchString(k.ID) {
		return fmt.Errorf("id %q", clip(k.ID))
	}
	return errors.Join(CheckAccount(k.Owner), checkKeyName(k.Name), oneOf("type", k.Type, "rsa", "ed25519"),
		checkText("fingerprint", k.Fingerprint, 1, 128), checkText("public key", k.PublicKey, 1, 16<<10), checkTime("created", k.Created), k.Tags.check())
}

// checkKeyName is for key pairs: 1-255 printable ASCII characters, as EC2's,
// but for '=', which metadata cannot carry.
func checkKeyName(s string) error {
	if len(s) < 1 || len(s) > 255 || strings.TrimSpace(s) != s {
		return fmt.Errorf("name %q: not 1 to 255 characters without blanks around", clip(s))
	}
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '=' {
			return fmt.Errorf("name %q: only printable ASCII without =", clip(s))
		}
	}
	return nil
}

func (a *Account) check() error {
	if a.Alias != "" && !aliasIs.MatchString(a.Alias) || a.Alias == "self" || a.Alias == "all" {
		return fmt.Errorf("alias %q", clip(a.Alias))
	}
	if len(a.Recipients) > 100 {
		return errors.New("more than 100 recipients")
	}
	for _, r := range a.Recipients {
		if err := checkText("recipient", r, 1, 16<<10); err != nil {
			return err
		}
	}
	return errors.Join(CheckAccount(a.ID), checkTime("created", a.Created))
}
