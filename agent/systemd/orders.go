package systemd

import "context"

// OrdersUnit is the unit that looks for a catalog's requests in the agent's place,
// which reaches no network.
const OrdersUnit = "instar-catalog-tasks.service"

// RunOrders starts the unit anew, with a command that may write the paths that are
// given, as ReadWritePaths= takes them, and nothing else. It gets the credential that workers get, and ends when
// the agent's service does.
func (u *Units) RunOrders(ctx context.Context, argv, writable []string) error {
	if err := u.Conn.Stop(ctx, OrdersUnit); err != nil { // of an agent that was killed
		return err
	}
	p := []Property{
		Prop("Description", "Instar: tasks of this machine from a catalog"),
		Prop("Type", "exec"),
		Prop("ExecStart", Exec(argv...)),
		Prop("Environment", u.Env),
		Prop("PartOf", []string{AgentService}),
		Prop("After", []string{AgentService}),
		Prop("CollectMode", "inactive-or-failed"),
		Prop("Restart", "on-failure"),
		Prop("RestartUSec", uint64(10_000_000)),
		Prop("CapabilityBoundingSet", uint64(0)),
		Prop("NoNewPrivileges", true),
		Prop("ProtectSystem", "strict"),
		Prop("ProtectHome", "read-only"),
		Prop("ReadWritePaths", writable),
		Prop("PrivateTmp", true),
		Prop("PrivateDevices", true),
		Prop("ProtectControlGroups", true),
		Prop("ProtectKernelModules", true),
		Prop("ProtectKernelTunables", true),
		Prop("RestrictNamespaces", uint64(0)),
		Prop("RestrictRealtime", true),
		Prop("LockPersonality", true),
		Prop("MemoryDenyWriteExecute", true),
		Prop("UMask", uint32(0o077)),
	}
	return u.Conn.Run(ctx, OrdersUnit, append(p, u.credential()...)...)
}

// credential is the property that hands the S3 secret key over.
func (u *Units) credential() []Property {
	if u.SecretKeyFile == "" {
		return nil
	}
	name := "LoadCredential"
	if u.Encrypted {
		name = "LoadCredentialEncrypted"
	}
	return []Property{Prop(name, []struct{ Name, Path string }{{SecretCredential, u.SecretKeyFile}})}
}
