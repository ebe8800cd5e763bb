package catalog

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Filter is a condition on images, as DescribeImages has them: the attribute
// Name has one of Values, in which * stands for any characters, ? for one, and
// \ in front of a character for that character itself.
type Filter struct {
	Name   string
	Values []string
}

// How many values all filters of a request may have, and how many bytes these.
const (
	MaxFilterValues = 200
	MaxFilterBytes  = 8192
)

// CreationLayout is how EC2 writes an image's creation date.
const CreationLayout = "2006-01-02T15:04:05.000Z"

// Filters are conditions, all of which an image must meet.
type Filters struct {
	all []compiledFilter
}

type compiledFilter struct {
	attribute func(m *Image, alias func(string) string, yield func(string) bool)
	exact     map[string]bool
	patterns  []pattern
	private   bool // of an image's owner alone
}

// privateAttributes are those that are shown to an image's owner alone, as tags
// of any key are: a filter that matched would tell others what they are.
var privateAttributes = map[string]bool{"tag-key": true, "tag-value": true, "source-instance-id": true}

// attributes are the filters of DescribeImages: what an image has of each. What
// it does not have at all matches nothing, not even *.
var attributes = map[string]func(m *Image, alias func(string) string, yield func(string) bool){
	"architecture": text(func(m *Image) string { return m.Architecture }),
	"block-device-mapping.delete-on-termination": volumes(func(b *BlockDevice) string { return strconv.FormatBool(b.EBS.DeleteOnTermination) }),
	"block-device-mapping.device-name":           devices,
	"block-device-mapping.encrypted":             volumes(func(b *BlockDevice) string { return strconv.FormatBool(b.EBS.Encrypted) }),
	"block-device-mapping.snapshot-id":           volumes(func(b *BlockDevice) string { return b.EBS.SnapshotID }),
	"block-device-mapping.volume-size":           volumes(func(b *BlockDevice) string { return positive(b.EBS.VolumeSize) }),
	"block-device-mapping.volume-type":           volumes(func(b *BlockDevice) string { return b.EBS.VolumeType }),
	"creation-date":                              text(func(m *Image) string { return m.Created.UTC().Format(CreationLayout) }),
	"description":                                text(func(m *Image) string { return m.Description }),
	"ena-support":                                text(func(m *Image) string { return strconv.FormatBool(m.EnaSupport) }),
	"free-tier-eligible":                         text(func(*Image) string { return "false" }),
	"hypervisor":                                 text(func(m *Image) string { return m.Hypervisor }),
	"image-allowed":                              text(func(*Image) string { return "true" }),
	"image-id":                                   text(func(m *Image) string { return m.ID }),
	"image-type":                                 text(func(m *Image) string { return m.Type }),
	"is-public":                                  text(func(m *Image) string { return strconv.FormatBool(m.Public) }),
	"kernel-id":                                  text(func(m *Image) string { return m.Kernel }),
	"manifest-location":                          text(func(m *Image) string { return m.Location }),
	"name":                                       text(func(m *Image) string { return m.Name }),
	"owner-alias": func(m *Image, alias func(string) string, yield func(string) bool) {
		if alias != nil {
			if a := alias(m.Owner); a != "" {
				yield(a)
			}
		}
	},
	"owner-id":             text(func(m *Image) string { return m.Owner }),
	"platform":             text(func(m *Image) string { return m.Platform }),
	"product-code":         codes(func(p ProductCode) string { return p.Code }),
	"product-code.type":    codes(func(p ProductCode) string { return p.Type }),
	"ramdisk-id":           text(func(m *Image) string { return m.Ramdisk }),
	"root-device-name":     text(func(m *Image) string { return m.RootDeviceName }),
	"root-device-type":     text(func(m *Image) string { return m.RootDeviceType }),
	"source-image-id":      text(func(m *Image) string { return m.SourceImage }),
	"source-image-region":  text(func(m *Image) string { return m.SourceRegion }),
	"source-instance-id":   text(func(m *Image) string { return m.SourceInstance }),
	"sriov-net-support":    text(func(m *Image) string { return m.SriovNetSupport }),
	"state":                text(func(m *Image) string { return string(m.State) }),
	"state-reason-code":    text(func(m *Image) string { return m.Reason.Code }),
	"state-reason-message": text(func(m *Image) string { return m.Reason.Message }),
	"tag-key": func(m *Image, _ func(string) string, yield func(string) bool) {
		for k := range m.Tags {
			if !yield(k) {
				return
			}
		}
	},
	"tag-value": func(m *Image, _ func(string) string, yield func(string) bool) {
		for _, v := range m.Tags {
			if !yield(v) {
				return
			}
		}
	},
	"virtualization-type": text(func(m *Image) string { return m.VirtualizationType }),
}

// FilterNames are the names a Filter may have, in order; and "tag:KEY".
func FilterNames() []string { return slices.Sorted(maps.Keys(attributes)) }

// ParseFilters reads a request's filters. One of a name that is not known is
// InvalidParameterValue, one without values MissingParameter.
func ParseFilters(l []Filter) (*Filters, error) {
	f := &Filters{}
	n, size := 0, 0
	for _, one := range l {
		c := compiledFilter{attribute: attributes[one.Name], exact: map[string]bool{}, private: privateAttributes[one.Name]}
		if key, ok := strings.CutPrefix(one.Name, "tag:"); ok && key != "" {
			c.private = true
			c.attribute = func(m *Image, _ func(string) string, yield func(string) bool) {
				if v, has := m.Tags[key]; has {
					yield(v)
				}
			}
		}
		if c.attribute == nil {
			return nil, refuse(CodeParameterValue, "The filter '%s' is invalid", clip(one.Name))
		}
		if len(one.Values) == 0 {
			return nil, refuse(CodeMissing, "The filter '%s' has no value", clip(one.Name))
		}
		if n += len(one.Values); n > MaxFilterValues {
			return nil, refuse("FilterLimitExceeded", "The request has more than %d filter values", MaxFilterValues)
		}
		for _, v := range one.Values {
			if len(v) > 4096 {
				return nil, refuse(CodeParameterValue, "A value of the filter '%s' has %d bytes", clip(one.Name), len(v))
			}
			if size += len(v); size > MaxFilterBytes {
				return nil, refuse("FilterLimitExceeded", "The request's filter values have more than %d bytes", MaxFilterBytes)
			}
			p := compile(v)
			if s, ok := p.exact(); ok {
				c.exact[s] = true
			} else {
				c.patterns = append(c.patterns, p)
			}
		}
		f.all = append(f.all, c)
	}
	return f, nil
}

// Match says whether the image meets all conditions. alias gives an account's
// alias, "" if it has none; it may be nil. owned says that the image is the
// asker's own: what only its owner is shown matches no one else's filter.
func (f *Filters) Match(m *Image, alias func(account string) string, owned bool) bool {
	for i := range f.all {
		c := &f.all[i]
		if c.private && !owned {
			return false
		}
		got := false
		c.attribute(m, alias, func(v string) bool {
			if c.exact[v] {
				got = true
			}
			for _, p := range c.patterns {
				got = got || p.match(v)
			}
			return !got
		})
		if !got {
			return false
		}
	}
	return true
}

func text(of func(*Image) string) func(*Image, func(string) string, func(string) bool) {
	return func(m *Image, _ func(string) string, yield func(string) bool) {
		if s := of(m); s != "" {
			yield(s)
		}
	}
}

func devices(m *Image, _ func(string) string, yield func(string) bool) {
	for i := range m.BlockDevices {
		if !yield(m.BlockDevices[i].Device) {
			return
		}
	}
}

func volumes(of func(*BlockDevice) string) func(*Image, func(string) string, func(string) bool) {
	return func(m *Image, _ func(string) string, yield func(string) bool) {
		for i := range m.BlockDevices {
			if b := &m.BlockDevices[i]; b.EBS != nil {
				if s := of(b); s != "" && !yield(s) {
					return
				}
			}
		}
	}
}

func codes(of func(ProductCode) string) func(*Image, func(string) string, func(string) bool) {
	return func(m *Image, _ func(string) string, yield func(string) bool) {
		for _, p := range m.ProductCodes {
			if !yield(of(p)) {
				return
			}
		}
	}
}

func positive(n int64) string {
	if n <= 0 {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

// Pattern is a compiled value of a filter, for what is no image: * stands for any
// characters, ? for one, and \ in front of a character for that character itself.
type Pattern struct{ p pattern }

// NewPattern compiles a pattern; every text is one.
func NewPattern(s string) Pattern { return Pattern{compile(s)} }

// Match says whether s is matched.
func (p Pattern) Match(s string) bool { return p.p.match(s) }

// pattern is a compiled value of a filter.
type pattern []token

// token is a character, or if it is negative a wildcard.
type token rune

const (
	anyNumber token = -1 // *
	anyOne    token = -2 // ?
)

// compile reads * and ? and takes a character behind \ for itself; a \ at the
// end stands for itself.
func compile(s string) pattern {
	p := make(pattern, 0, len(s))
	quoted := false
	for _, r := range s {
		switch {
		case quoted:
			p, quoted = append(p, token(r)), false
		case r == '\\':
			quoted = true
		case r == '*':
			if len(p) == 0 || p[len(p)-1] != anyNumber {
				p = append(p, anyNumber)
			}
		case r == '?':
			p = append(p, anyOne)
		default:
			p = append(p, token(r))
		}
	}
	if quoted {
		p = append(p, '\\')
	}
	return p
}

// exact is the one text that the pattern matches, if it has no wildcard.
func (p pattern) exact() (string, bool) {
	var b strings.Builder
	for _, t := range p {
		if t < 0 {
			return "", false
		}
		b.WriteRune(rune(t))
	}
	return b.String(), true
}

// match matches characters. Going back to the last * only keeps the time at
// length of s × length of p.
func (p pattern) match(s string) bool {
	i, j := 0, 0 // in s, in p
	star, mark := -1, 0
	for i < len(s) {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case j < len(p) && p[j] == anyNumber:
			star, mark = j, i
			j++
		case j < len(p) && (p[j] == anyOne || p[j] == token(r)):
			i += n
			j++
		case star >= 0:
			_, m := utf8.DecodeRuneInString(s[mark:])
			mark += m
			i, j = mark, star+1
		default:
			return false
		}
	}
	for j < len(p) && p[j] == anyNumber {
		j++
	}
	return j == len(p)
}
