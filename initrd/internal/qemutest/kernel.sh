# usage: kernel.sh stable|newer ARCH DIR
# Unpacks Debian's cloud kernel to DIR/root, whole or not at all: its package, and
# not the one without files that depends on it. apt checks signatures and digests.
set -eu
release=$1 arch=$2
cd "$3"
rm -rf new
mkdir -p new/lists/partial new/cache/archives/partial
cd new
own="-o Dir::State::Lists=$PWD/lists -o Dir::Cache=$PWD/cache -o APT::Architecture=$arch -o APT::Architectures=$arch -o APT::Sandbox::User=root"
apt='-o Acquire::Retries=5'

# find finds the package in the lists that apt has.
find() {
	pkg=$(apt-cache $apt depends "linux-image-cloud-$arch" 2>/dev/null | sed -n 's/^ *Depends: //p' | grep -m1 '^linux-image-')
}

# mirrors are where this machine gets Debian from, the likelier ones first.
mirrors() {
	for origin in 'Origin: Debian' 'Created-By: Packages'; do
		apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "$origin" | grep debian | grep -v security
	done | awk '!seen[$0]++'
}

# suite finds the package in another suite than this machine's: in lists of our own.
suite() {
	for mirror in $(mirrors); do
		echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $1 main" >list
		apt-get $apt -q update && find && return
	done
	return 1
}

if [ "$release" = newer ]; then
	[ "$(mirrors)" ] || apt-get $apt -q update || true
	apt="$apt $own -o Dir::Etc::SourceList=$PWD/list -o Dir::Etc::SourceParts=/dev/null"
	suite bookworm-backports || suite trixie
else
	if [ "$arch" != "$(dpkg --print-architecture)" ]; then
		apt="$apt $own"
		apt-get $apt -q update || true
	fi
	find || { apt-get $apt -q update || true; find; }
fi
apt-get $apt -q download "$pkg"
dpkg-deb -x ./*.deb root
mv root ..
cd ..
rm -rf new
