package inject

import (
	"fmt"
	"io"
	"os"
)

// userDataUnit runs the user data once the network is there. The journal of
// /var/lib/instar, not the unit, sees to it that nothing runs twice.
const userDataUnit = `[Unit]
Description=User data of this instance (Instar)
Documentation=man:instar(1)
Wants=network-online.target
After=network-online.target local-fs.target
ConditionPathExists=/run/instar/user-data

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/run/instar/instar-init user-data
KillMode=process
TimeoutStartSec=infinity
StandardOutput=journal+console
StandardError=journal+console

[Install]
WantedBy=multi-user.target
`

// layUnits puts the user data, the program that runs it and the unit that
// starts the program in run. Nothing of this is on the root disk.
func layUnits(run, program string, in Instance) error {
	if err := writeRun(run, "instar/user-data", in.UserData, 0o755, 0o600); err != nil {
		return fmt.Errorf("laying down user data: %w", err)
	}
	if err := copyProgram(run, program); err != nil {
		return fmt.Errorf("laying down the program that runs user data: %w", err)
	}
	if err := writeRun(run, "systemd/system/instar-user-data.service", []byte(userDataUnit), 0o755, 0o644); err != nil {
		return fmt.Errorf("laying down a unit: %w", err)
	}
	r, err := os.OpenRoot(run)
	if err != nil {
		return err
	}
	defer r.Close()
	const wants = "systemd/system/multi-user.target.wants"
	if err := r.MkdirAll(wants, 0o755); err != nil {
		return fmt.Errorf("enabling a unit: %w", err)
	}
	link := wants + "/instar-user-data.service"
	if err := r.Remove(link); err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("enabling a unit: %w", err)
	}
	if err := r.Symlink("../instar-user-data.service", link); err != nil {
		return fmt.Errorf("enabling a unit: %w", err)
	}
	return nil
}

func copyProgram(run, program string) error {
	in, err := os.Open(program)
	if err != nil {
		return err
	}
	defer in.Close()
	r, err := os.OpenRoot(run)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := r.Remove("instar/instar-init"); err != nil && !os.IsNotExist(err) {
		return err
	}
	out, err := r.OpenFile("instar/instar-init", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}
