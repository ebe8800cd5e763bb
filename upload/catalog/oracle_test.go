package catalog

import (
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// oracleHas is what an image has of a filter, written down apart from the code.
func oracleHas(m *Image, alias, name string, owned bool) (out []string) {
	if !owned && (strings.HasPrefix(name, "tag") || name == "source-instance-id") {
		return nil // its owner's alone
	}
	if key, ok := strings.CutPrefix(name, "tag:"); ok {
		if v, has := m.Tags[key]; has {
			return []string{v}
		}
		return nil
	}
	volume := func(of func(*EBS) string) {
		for _, b := range m.BlockDevices {
			if b.EBS != nil {
				out = append(out, of(b.EBS))
			}
		}
	}
	switch name {
	case "tag-key", "tag-value":
		for k, v := range m.Tags {
			out = append(out, map[string]string{"tag-key": k, "tag-value": v}[name])
		}
		return out
	case "block-device-mapping.device-name":
		for _, b := range m.BlockDevices {
			out = append(out, b.Device)
		}
	case "block-device-mapping.volume-size":
		volume(func(e *EBS) string {
			if e.VolumeSize == 0 {
				return ""
			}
			return strconv.FormatInt(e.VolumeSize, 10)
		})
	case "block-device-mapping.volume-type":
		volume(func(e *EBS) string { return e.VolumeType })
	case "block-device-mapping.snapshot-id":
		volume(func(e *EBS) string { return e.SnapshotID })
	case "block-device-mapping.encrypted":
		volume(func(e *EBS) string { return fmt.Sprint(e.Encrypted) })
	case "block-device-mapping.delete-on-termination":
		volume(func(e *EBS) string { return fmt.Sprint(e.DeleteOnTermination) })
	case "product-code", "product-code.type":
		for _, p := range m.ProductCodes {
			out = append(out, map[string]string{"product-code": p.Code, "product-code.type": p.Type}[name])
		}
	default:
		out = []string{map[string]string{
			"architecture": m.Architecture, "creation-date": m.Created.Format("2006-01-02T15:04:05.000Z"), "description": m.Description,
			"ena-support": fmt.Sprint(m.EnaSupport), "free-tier-eligible": "false", "hypervisor": m.Hypervisor, "image-allowed": "true", "image-id": m.ID,
			"image-type": m.Type, "is-public": fmt.Sprint(m.Public), "kernel-id": m.Kernel, "manifest-location": m.Location, "name": m.Name, "owner-alias": alias,
			"owner-id": m.Owner, "platform": m.Platform, "ramdisk-id": m.Ramdisk, "root-device-name": m.RootDeviceName, "root-device-type": m.RootDeviceType,
			"source-image-id": m.SourceImage, "source-image-region": m.SourceRegion, "source-instance-id": m.SourceInstance, "state": string(m.State),
			"state-reason-code": m.Reason.Code, "state-reason-message": m.Reason.Message, "sriov-net-support": m.SriovNetSupport, "virtualization-type": m.VirtualizationType,
		}[name]}
	}
	return slices.DeleteFunc(out, func(s string) bool { return s == "" })
}

// oracleMatch is the pattern as a regular expression.
func oracleMatch(pattern, s string) bool {
	var re strings.Builder
	runes := []rune(pattern)
	for i := 0; i < len(runes); i++ {
		switch {
		case runes[i] == '\\' && i+1 < len(runes):
			i++
			re.WriteString(regexp.QuoteMeta(string(runes[i])))
		case runes[i] == '*':
			re.WriteString(".*")
		case runes[i] == '?':
			re.WriteString(".")
		default:
			re.WriteString(regexp.QuoteMeta(string(runes[i])))
		}
	}
	return regexp.MustCompile(`(?s)\A` + re.String() + `\z`).MatchString(s)
}

// TestModelFilters holds random filters of random images against the oracle:
// 100,000 queries, or $INSTAR_FILTER_QUERIES.
func TestModelFilters(t *testing.T) {
	n := 100_000
	if s := os.Getenv("INSTAR_FILTER_QUERIES"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	text := func(most int) string { // few letters, so that things match
		var b strings.Builder
		for range r.IntN(most + 1) {
			b.WriteString([]string{"a", "b", "*", "?", `\`, "é", "/", "A"}[r.IntN(8)])
		}
		return b.String()
	}
	yes := func() bool { return r.IntN(2) == 0 }
	names := append(FilterNames(), "tag:a", "tag:b", "tag:*")
	matched := 0
	for i := range n {
		m := &Image{
			ID: text(3), Name: text(3), Description: text(3), Owner: text(2), State: State(text(2)), Reason: Reason{text(2), text(2)}, Location: text(3),
			Architecture: text(2), Type: text(2), Platform: text(1), RootDeviceType: text(2), RootDeviceName: text(2), VirtualizationType: text(2), Hypervisor: text(2),
			Kernel: text(2), Ramdisk: text(2), SriovNetSupport: text(2), EnaSupport: yes(), Public: yes(), SourceImage: text(2), SourceRegion: text(2),
			SourceInstance: text(2), Created: time.Unix(r.Int64N(1<<31), 0).UTC(), Tags: Tags{},
		}
		for range r.IntN(3) {
			m.Tags[text(1)] = text(2)
			m.ProductCodes = append(m.ProductCodes, ProductCode{"c" + text(1), "t" + text(1)})
			b := BlockDevice{Device: "d" + text(1)}
			if yes() {
				b.EBS = &EBS{SnapshotID: text(2), VolumeSize: r.Int64N(20), VolumeType: text(2), Encrypted: yes(), DeleteOnTermination: yes()}
			}
			m.BlockDevices = append(m.BlockDevices, b)
		}
		alias, owned := text(1), r.IntN(3) > 0
		var filters []Filter
		want := true
		for range 1 + r.IntN(3) {
			f := Filter{Name: names[r.IntN(len(names))]}
			has := oracleHas(m, alias, f.Name, owned)
			for range 1 + r.IntN(3) {
				v := text(3)
				switch r.IntN(6) {
				case 0:
					v = "*" + v
				case 1:
					v += "*"
				case 2:
					v = []string{"true", "false", "1?", "20*", "*"}[r.IntN(5)]
				case 3:
					if len(has) > 0 {
						v = has[r.IntN(len(has))]
					}
				}
				f.Values = append(f.Values, v)
			}
			filters = append(filters, f)
			want = want && slices.ContainsFunc(has, func(s string) bool {
				return slices.ContainsFunc(f.Values, func(v string) bool { return oracleMatch(v, s) })
			})
		}
		parsed, err := ParseFilters(filters)
		if err != nil {
			t.Fatalf("query %d, %q: %v", i, filters, err)
		}
		if got := parsed.Match(m, func(string) string { return alias }, owned); got != want {
			t.Fatalf("query %d, %q, owned %t: %v, want %v, of %+v", i, filters, owned, got, want, m)
		}
		if want {
			matched++
		}
	}
	t.Logf("%d queries, %d of which find their image", n, matched)
	if matched < n/20 || matched > n*19/20 {
		t.Errorf("%d of %d queries find their image: too few or too many to tell much", matched, n)
	}
}
