package chunked

import (
	"fmt"
	"strings"
)

// Folders of a store's keys (SPEC.md §3).
const (
	DomainsFolder = "domains/"
	PacksFolder   = "packs/"
	IndexFolder   = "index/"
	ImagesFolder  = "images/"
	MovedFolder   = "moved/"
	GCFolder      = "gc/"
	RunsFolder    = "runs/"
)

func fanned(folder string, n Name) string {
	s := n.String()
	return folder + s[:2] + "/" + s
}

// PackKey is where pack n is.
func PackKey(n Name) string { return fanned(PacksFolder, n) }

// IndexObjectKey is where the index segment or root n is.
func IndexObjectKey(n Name) string { return fanned(IndexFolder, n) }

// MovedKey is where one reads what became of pack n.
func MovedKey(n Name) string { return fanned(MovedFolder, n) }

// ImageFolder is what all keys of an image begin with.
func ImageFolder(image string) string { return ImagesFolder + image + "/" }

// ManifestsFolder is what the keys of all manifests of an image begin with.
func ManifestsFolder(image string) string { return ImageFolder(image) + "manifests/" }

// ManifestKey is where manifest n of an image is.
func ManifestKey(image string, n Name) string { return ManifestsFolder(image) + n.String() }

// KeysKey is where the index key of manifest n of an image is.
func KeysKey(image string, n Name) string { return ImageFolder(image) + "keys/" + n.String() }

// TraceKey is where the boot trace of manifest n of an image is.
func TraceKey(image string, n Name) string { return ImageFolder(image) + "traces/" + n.String() }

// OpeningKey is where the opening of manifest n of an image is.
func OpeningKey(image string, n Name) string {
	return ImageFolder(image) + "openings/" + n.String()
}

// HeadKey is where one reads which manifest of an image is the newest.
func HeadKey(image string) string { return ImageFolder(image) + "head" }

// DomainKey is where a domain's secret is.
func DomainKey(domain string) string { return DomainsFolder + domain }

// GCKey is where the list of condemned objects with this ID is.
func GCKey(id string) string { return GCFolder + id }

// RunKey is where the capture with this ID says that it is under way.
func RunKey(id string) string { return RunsFolder + id }

// ParseFanned reads a key that [PackKey], [IndexObjectKey] or [MovedKey] made:
// folder is the constant it begins with.
func ParseFanned(folder, key string) (Name, error) {
	rest, ok := strings.CutPrefix(key, folder)
	hh, name, ok2 := strings.Cut(rest, "/")
	if ok && ok2 {
		if n, err := ParseName(name); err == nil && hh == name[:2] {
			return n, nil
		}
	}
	return Name{}, fmt.Errorf("%w: key %q is not %sHH/NAME", ErrFormat, clip(key), folder)
}

// CheckImageName tells what is wrong with an image's name, if anything.
func CheckImageName(s string) error { return checkName("image", s) }

// CheckDomainName tells what is wrong with a domain's name, if anything.
func CheckDomainName(s string) error { return checkName("domain", s) }

func checkName(what, s string) error {
	if len(s) < 1 || len(s) > 128 {
		return fmt.Errorf("%w: %s name %q: 1 to 128 characters are allowed", ErrFormat, what, clip(s))
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
		case i > 0 && (c == '.' || c == '_' || c == '-'):
		default:
			return fmt.Errorf("%w: %s name %q: letters and digits are allowed, and behind the first also . _ -", ErrFormat, what, s)
		}
	}
	return nil
}
