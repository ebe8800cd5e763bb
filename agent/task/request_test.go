package task_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/instar-image/instar/agent/task"
)

func TestRequests(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{`{"kind":"create-image","name":"web-1"}`, ""},
		{`{"kind":"bundle","name":"web-1","private-key":"/k","quiesce":{"stop":["a.service"],"limit":"90s"}}`, ""},
		{`{"kind":"create-image","name":"web-1","limits":{"cpu-weight":-1,"upload-rate":1048576}}`, ""},
		{`{"kind":"snapshot","name":"web-1"}`, "kind"},
		{`{"kind":"create-image","name":"../x"}`, "name"},
		{`{"kind":"create-image","name":"-x"}`, "name"},
		{`{"kind":"create-image","name":"x","volume":"srv"}`, "absolute"},
		{`{"kind":"create-image","name":"x","user":"1"}`, "of bundles"},
		{`{"kind":"bundle","name":"x","full":true}`, "of images"},
		{`{"kind":"create-image","name":"x","secret-key":"s"}`, "unknown field"},
		{`{"kind":"create-image","name":"x","description":"a\nb"}`, "line breaks"},
		{`{"kind":"create-image","name":"x","exclude":["a,b"]}`, "comma"},
		{`{"kind":"create-image","name":"x","exclude":[""]}`, "empty"},
		{`{"kind":"create-image","name":"x","architecture":"vax"}`, "architecture"},
		{`{"kind":"create-image","name":"x","limits":{"cpu-weight":0.5}}`, "limits"},
		{`{"kind":"create-image","name":"x","limits":{"io-weight":20000}}`, "io-weight"},
		{`{"kind":"create-image","name":"x","quiesce":{"stop":["app"]}}`, "no name of a unit"},
		{`{"kind":"create-image","name":"x","quiesce":{"stop":["a.service"],"freeze":["a.service"]}}`, "twice"},
		{`{"kind":"create-image","name":"x","quiesce":{"filesystems":["srv"]}}`, "mount point"},
		{`{"kind":"create-image","name":"x","quiesce":{"freeze":["-.slice"]}}`, "cannot stand still"},
		{`{"kind":"create-image","name":"x","quiesce":{"freeze":["system.slice"]}}`, "cannot stand still"},
		{`{"kind":"create-image","name":"x","quiesce":{"freeze":["init.scope"]}}`, "cannot stand still"},
		{`{"kind":"create-image","name":"x","quiesce":{"stop":["dbus.service"]}}`, "cannot stand still"},
		{`{"kind":"create-image","name":"x","quiesce":{"stop":["dbus-broker.service"]}}`, "cannot stand still"},
		{`{"kind":"create-image","name":"x","quiesce":{"freeze":["systemd-journald.service"]}}`, "cannot stand still"},
		{`{"kind":"create-image","name":"x","quiesce":{"freeze":["instar.slice"]}}`, "cannot stand still"},
		{`{"kind":"create-image","name":"x","quiesce":{"stop":["instar-agent.service"]}}`, "cannot stand still"},
		{`{"kind":"create-image","name":"x","quiesce":{"stop":["dbusmon.service","user.slice"]}}`, ""},
		{`{"kind":"create-image","name":"x","quiesce":{"limit":"-5s"}}`, "span"},
		{`{"kind":"create-image","name":"x","quiesce":{"limit":"48h"}}`, "24h"},
		{`{"kind":"create-image","name":"x","client-token":"a b"}`, "token"},
		{`{"kind":"create-image","name":"x"} x`, ""},
		{``, "EOF"},
	} {
		_, err := task.DecodeRequest([]byte(c.text))
		switch {
		case c.text == `{"kind":"create-image","name":"x"} x`:
			if err == nil {
				t.Errorf("%s: what follows was taken", c.text)
			}
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", c.text, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || !errors.Is(err, task.ErrRequest)):
			t.Errorf("%s: %v, want %q", c.text, err, c.want)
		}
	}
}

func FuzzDecodeRequest(f *testing.F) {
	f.Add([]byte(`{"kind":"create-image","name":"web-1","exclude":["/x"],"limits":{"cpu-weight":5},"quiesce":{"stop":["a.service"],"limit":"1m"}}`))
	f.Add([]byte(`{"kind":"bundle","name":"w","private-key":"/k","client-token":"t"}`))
	f.Add([]byte(`{"kind":"bundle","name":"w"}{`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := task.DecodeRequest(data)
		if err != nil {
			return
		}
		// What was taken is written and read as the same.
		text, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		again, err := task.DecodeRequest(text)
		if err != nil {
			t.Fatalf("%s, from %q: %v", text, data, err)
		}
		if second, err := json.Marshal(again); err != nil || string(second) != string(text) {
			t.Fatalf("%s became %s, %v", text, second, err)
		}
	})
}
