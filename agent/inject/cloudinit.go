package inject

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// cloudInit tells whether cloud-init is installed in the root and enabled:
// then it, not Instar, runs user data and writes keys.
func (h *hierarchy) cloudInit() bool {
	if h.Exists("/etc/cloud/cloud-init.disabled") {
		return false
	}
	program := h.Exists("/usr/bin/cloud-init") || h.Exists("/usr/local/bin/cloud-init")
	for _, dir := range []string{"/lib/systemd/system", "/usr/lib/systemd/system", "/etc/systemd/system"} {
		if program && (h.Exists(dir+"/cloud-init.service") || h.Exists(dir+"/cloud-init-main.service")) {
			return true
		}
	}
	return program && h.Exists("/etc/init.d/cloud-init")
}

// seedCloudInit writes a NoCloud seed to run (the directory that will be
// /run) and the runtime configuration by which cloud-init finds it. The answer
// ds-identify would compute is put beside it: as if it had run.
func seedCloudInit(run string, in Instance) error {
	meta := map[string]any{
		"instance-id":    in.ID,
		"local-hostname": in.Hostname,
	}
	if len(in.Keys) > 0 {
		meta["public-keys"] = in.Keys
	}
	if in.Hostname == "" {
		delete(meta, "local-hostname")
	}
	// JSON is YAML, and has one way to quote.
	metaJSON, err := json.MarshalIndent(meta, "", "  ")
	if err != nil {
		return err
	}
	config := map[string]any{
		"datasource_list": []string{"NoCloud", "None"},
		"datasource": map[string]any{"NoCloud": map[string]any{
			"seedfrom": "/run/instar/seed/",
			"fs_label": nil,
		}},
	}
	if in.User != "" {
		config["system_info"] = map[string]any{"default_user": map[string]any{"name": in.User}}
		if in.User == "root" {
			config["disable_root"] = false
		}
	}
	configJSON, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
		dir  os.FileMode
		perm os.FileMode
	}{
		{"instar/seed/meta-data", metaJSON, 0o700, 0o600},
		{"instar/seed/user-data", in.UserData, 0o700, 0o600},
		{"instar/seed/vendor-data", nil, 0o700, 0o600},
		{"cloud-init/cloud.cfg", configJSON, 0o755, 0o644},
		{"cloud-init/.ds-identify.result", []byte("0\n"), 0o755, 0o644},
	} {
		if err := writeRun(run, f.name, f.data, f.dir, f.perm); err != nil {
			return fmt.Errorf("seeding cloud-init: %w", err)
		}
	}
	return nil
}

// writeRun writes a file below the directory run, which is root's own.
func writeRun(run, name string, data []byte, dirPerm, perm os.FileMode) error {
	r, err := os.OpenRoot(run)
	if err != nil {
		return err
	}
	defer r.Close()
	dir := filepath.Dir(name)
	if err := r.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := r.Mkdir(dir, dirPerm); err != nil && !os.IsExist(err) {
		return err
	}
	if err := r.Remove(name); err != nil && !os.IsNotExist(err) {
		return err
	}
	return r.WriteFile(name, data, perm)
}
