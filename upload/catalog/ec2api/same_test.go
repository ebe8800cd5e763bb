package ec2api_test

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
)

// node is an element of a document.
type node struct {
	name, text string
	kids       []*node
}

func (n *node) String() string { return n.name + "=" + n.text }

// find is the first element of that name, in any depth.
func (n *node) find(name string) *node {
	if n.name == name {
		return n
	}
	for _, k := range n.kids {
		if f := k.find(name); f != nil {
			return f
		}
	}
	return nil
}

func parseXML(b []byte) (*node, error) {
	stack := []*node{{}}
	for d := xml.NewDecoder(bytes.NewReader(b)); ; {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) && len(stack) == 1 && len(stack[0].kids) == 1 {
			return stack[0].kids[0], nil
		}
		if err != nil {
			return nil, fmt.Errorf("the answer is no document: %w", err)
		}
		top := stack[len(stack)-1]
		switch tok := tok.(type) {
		case xml.StartElement:
			k := &node{name: tok.Name.Local}
			top.kids = append(top.kids, k)
			stack = append(stack, k)
		case xml.EndElement:
			stack = stack[:len(stack)-1]
		case xml.CharData:
			top.text += string(tok)
		}
	}
}

// fields are the SDK's names of elements where they are not the element's with a
// capital.
var fields = map[string]string{
	"imagesSet": "Images", "imageState": "State", "imageOwnerId": "OwnerId", "isPublic": "Public", "tagSet": "Tags",
	"blockDeviceMapping": "BlockDeviceMappings", "launchPermission": "LaunchPermissions", "kernel": "KernelId", "ramdisk": "RamdiskId",
	"productCode": "ProductCodeId", "type": "ProductCodeType", "bundleInstanceTask": "BundleTask", "bundleInstanceTasksSet": "BundleTasks",
	"error": "BundleTaskError", "keySet": "KeyPairs", "regionInfo": "Regions", "regionEndpoint": "Endpoint", "availabilityZoneInfo": "AvailabilityZones",
	"zoneState": "State", "deleteSnapshotResultSet": "DeleteSnapshotResults", "storeImageTaskResultSet": "StoreImageTaskResults",
}

// clocks are fields that hold the time of the server, which is the record's to a
// few seconds.
var clocks = []string{"CreationDate", "CreateTime", "StartTime", "UpdateTime", "TaskStartTime"}

// sameness compares answers with what the SDK made of those when it was recorded.
type sameness struct {
	// then are the fingerprints that keys made at random had, by those they have.
	then map[string]string
}

// answer compares a whole answer. It says what is not the same.
func (s *sameness) answer(action string, root *node, output any) string {
	if root.name != action+"Response" {
		return "the answer is a " + root.name
	}
	if r := root.find(action + "Result"); r != nil { // as STS has it
		root = r
	}
	have, _ := output.(map[string]any)
	n := &node{name: root.name}
	for _, k := range root.kids {
		if k.name == "requestId" || k.name == "return" && have["Return"] == nil && k.text == "true" {
			continue
		}
		n.kids = append(n.kids, k)
	}
	if output == nil {
		output = map[string]any{}
	}
	if action == "CreateKeyPair" {
		if is, was := root.find("keyFingerprint"), have["KeyFingerprint"]; is != nil && was != nil {
			if len(is.text) != len(was.(string)) {
				return fmt.Sprintf("the fingerprint is %s, the SDK had %s", is.text, was)
			}
			s.then[is.text] = was.(string)
		}
	}
	return s.differ(root.name, n, output)
}

func (s *sameness) differ(path string, n *node, v any) string {
	switch v := v.(type) {
	case map[string]any:
		seen := map[string]bool{}
		for _, k := range n.kids {
			field := fields[k.name]
			if field == "" {
				field = strings.ToUpper(k.name[:1]) + k.name[1:]
			}
			is, ok := v[field]
			if !ok || seen[field] {
				return fmt.Sprintf("%s has %s, and the SDK's %s had none", path, k.name, field)
			}
			seen[field] = true
			if d := s.differ(path+"/"+k.name, k, is); d != "" {
				return d
			}
		}
		for field, is := range v {
			if !seen[field] {
				return fmt.Sprintf("%s has nothing for the SDK's %s, which was %v", path, field, is)
			}
		}
		return ""
	case []any:
		if i := slices.IndexFunc(n.kids, func(k *node) bool { return k.name != "item" }); i >= 0 || len(n.kids) != len(v) {
			return fmt.Sprintf("%s has %d items, the SDK's %d", path, len(n.kids), len(v))
		}
		for i, k := range n.kids {
			if d := s.differ(fmt.Sprintf("%s/%d", path, i), k, v[i]); d != "" {
				return d
			}
		}
		return ""
	}
	if len(n.kids) > 0 {
		return path + " has elements, the SDK's none"
	}
	if is := scalarOf(path, n.text, v); is != v && s.then[n.text] != v {
		return fmt.Sprintf("%s is %q, the SDK's was %v", path, n.text, v)
	}
	return ""
}

// scalarOf reads a text as what the SDK had in its place. What it had is given
// back for a time of the server's that is near enough, and for a private key.
func scalarOf(path, text string, was any) any {
	field := path[strings.LastIndexByte(path, '/')+1:]
	field = strings.ToUpper(field[:1]) + field[1:]
	switch was := was.(type) {
	case bool:
		if b, err := strconv.ParseBool(text); err == nil {
			return b
		}
	case float64:
		if f, err := strconv.ParseFloat(text, 64); err == nil {
			return f
		}
	case string:
		switch {
		case slices.Contains(clocks, field):
			a, aerr := time.Parse("2006-01-02T15:04:05.000Z", text)
			b, berr := time.Parse(time.RFC3339Nano, was)
			if aerr == nil && berr == nil && a.Sub(b).Abs() < 10*time.Minute {
				return was
			}
		case field == "KeyMaterial" && strings.HasPrefix(text, was+"\n"):
			return was
		}
	}
	return text
}
