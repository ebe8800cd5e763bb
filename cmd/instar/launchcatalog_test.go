package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/instar-image/instar/agent/inject/userdata"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/upload/catalog"
)

// TestImageUserData: what the catalog makes of an image's files and parameters is
// what injection takes, beside each kind of user data that there may be.
func TestImageUserData(t *testing.T) {
	m := &catalog.Image{
		Parameters: []catalog.Parameter{{Name: "PORT", Type: "integer", Default: "80"}, {Name: "SITE", Type: "string", Required: true}},
		Files: []catalog.File{
			{Path: "/etc/web.conf", Content: []byte("port ${PORT} ${NOTHING}\n"), Template: true},
			{Path: "/etc/plain", Mode: "0600", Owner: "web:web", Content: []byte("${PORT}\n")},
		},
	}
	if _, _, err := m.Arguments(map[string]string{"SITE": "it's\nhere"}); err == nil {
		t.Error("a value of two lines is taken")
	}
	if _, missing, err := m.Arguments(nil); err != nil || len(missing) != 1 || missing[0].Name != "SITE" {
		t.Errorf("%v, %v", missing, err)
	}
	values, _, err := m.Arguments(map[string]string{"SITE": "it's here"})
	if err != nil {
		t.Fatal(err)
	}
	for _, own := range []string{"", "#!/bin/sh\ntrue\n", "#cloud-config\nwrite_files: []\n", "#include\nhttp://127.0.0.1/x\n"} {
		data, err := m.UserData(values, []byte(own), metadata.MaxUserData)
		if err != nil {
			t.Fatal(err)
		}
		parts, err := userdata.Parse(data)
		if err != nil {
			t.Fatalf("%q: %v", own, err)
		}
		want := 1
		if own != "" {
			want = 2
		}
		if len(parts) != want || parts[0].Kind != userdata.CloudConfig {
			t.Errorf("%q: %d parts", own, len(parts))
		}
		if own != "" && strings.TrimSpace(string(parts[1].Data)) != strings.TrimSpace(own) {
			t.Errorf("%q became %q", own, parts[1].Data)
		}
	}
	for _, own := range []string{"plain", "\x1f\x8b\x08", "MIME-Version: 1.0\n"} {
		if _, err := m.UserData(values, []byte(own), metadata.MaxUserData); err == nil {
			t.Errorf("%q is taken", own)
		}
	}
	m.Files[1].Content = bytes.Repeat([]byte("a"), 60_000)
	if data, err := m.UserData(values, nil, metadata.MaxUserData); err != nil || len(data) > metadata.MaxUserData {
		t.Errorf("%d bytes, %v", len(data), err)
	}
}
