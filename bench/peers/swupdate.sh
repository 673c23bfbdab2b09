#!/usr/bin/env bash
# SWUpdate, raw handler, description signed with CMS: swupdate.sh prepare|install none|zstd
# in DIR, of IMAGE, into SLOT. Prints what it is; exit code 77 if it is not there.
set -euo pipefail
for t in swupdate openssl cpio zstd; do command -v $t >/dev/null || { echo "$t is not installed"; exit 77; }; done
cd "$DIR"
case $1 in
prepare)
	openssl req -x509 -newkey rsa:2048 -nodes -days 9 -sha256 -subj /CN=bench -addext basicConstraints=critical,CA:TRUE \
		-addext keyUsage=digitalSignature,keyCertSign -addext extendedKeyUsage=emailProtection,codeSigning \
		-keyout key.pem -out cert.pem 2>/dev/null
	how=
	if [ "$2" = zstd ]; then zstd -q -f -3 "$IMAGE" -o rootfs.img; how='compressed = "zstd";'; else cp "$IMAGE" rootfs.img; fi
	sum=$(openssl dgst -sha256 -r rootfs.img | cut -d' ' -f1)
	cat >sw-description <<-X
	software = { version = "2"; hardware-compatibility: [ "1.0" ];
	  images: ( { filename = "rootfs.img"; device = "$SLOT"; type = "raw"; $how installed-directly = true; sha256 = "$sum"; } ); }
	X
	openssl cms -sign -in sw-description -out sw-description.sig -signer cert.pem -inkey key.pem -outform DER -nosmimecap -binary
	printf '%s\n' sw-description sw-description.sig rootfs.img | cpio -o -H crc --quiet >fw.swu
	rm rootfs.img
	echo 'globals : { };' >swupdate.cfg
	echo "SWUpdate $(dpkg-query -W -f "\${Version}" swupdate 2>/dev/null || true), $2"
	;;
install) swupdate -f swupdate.cfg -k cert.pem -H board:1.0 -l 3 -i fw.swu ;;
esac
