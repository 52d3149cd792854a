// Seals a token as docs/sealing.md says, written from that page alone, with Go's standard library.
// It reads {"publicKey", "namespace", "name", "accountSid", "token"} from standard input and prints the sealed value.
package main

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/mlkem"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha3"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
)

type request struct {
	PublicKey, Namespace, Name, AccountSid, Token string
}

var suite = []byte("HPKE\x64\x7a\x00\x01\x00\x02")

func main() {
	var asked request
	check(json.NewDecoder(os.Stdin).Decode(&asked))
	publicKey := must(base64.StdEncoding.DecodeString(asked.PublicKey))
	if len(publicKey) != 1216 {
		check(fmt.Errorf("a public key has 1216 bytes, not %d", len(publicKey)))
	}
	shared, encapsulated := encapsulate(publicKey)
	ciphertext := encrypt(shared, info(asked), []byte(asked.Token))
	fingerprint := sha256.Sum256(publicKey)
	envelope := append([]byte{1}, fingerprint[:8]...)
	envelope = append(envelope, encapsulated...)
	envelope = append(envelope, ciphertext...)
	fmt.Println(base64.StdEncoding.EncodeToString(envelope))
}

// info is the binding: each part after its length.
func info(asked request) []byte {
	var encoded []byte
	parts := []string{"\x01", "channels.hydracore.io/token", asked.Namespace, asked.Name, asked.AccountSid}
	for _, part := range parts {
		encoded = binary.BigEndian.AppendUint32(encoded, uint32(len(part)))
		encoded = append(encoded, part...)
	}
	return encoded
}

// encapsulate makes the shared secret and what the holder of the private key needs to find it.
func encapsulate(publicKey []byte) (shared, encapsulated []byte) {
	lattice := must(mlkem.NewEncapsulationKey768(publicKey[:1184]))
	curve := must(ecdh.X25519().NewPublicKey(publicKey[1184:]))
	first, latticeCiphertext := lattice.Encapsulate()
	ephemeral := must(ecdh.X25519().GenerateKey(rand.Reader))
	second := must(ephemeral.ECDH(curve))
	curveCiphertext := ephemeral.PublicKey().Bytes()
	hash := sha3.New256()
	for _, each := range [][]byte{first, second, curveCiphertext, publicKey[1184:], []byte(`\.//^\`)} {
		hash.Write(each)
	}
	return hash.Sum(nil), append(latticeCiphertext, curveCiphertext...)
}

// encrypt is HPKE's key schedule in base mode, and one message.
func encrypt(shared, info, token []byte) []byte {
	context := []byte{0}
	context = append(context, extract(nil, "psk_id_hash", nil)...)
	context = append(context, extract(nil, "info_hash", info)...)
	secret := extract(shared, "secret", nil)
	block := must(aes.NewCipher(expand(secret, "key", context, 32)))
	sealer := must(cipher.NewGCM(block))
	return sealer.Seal(nil, expand(secret, "base_nonce", context, 12), token, nil)
}

func extract(salt []byte, label string, input []byte) []byte {
	labeled := append(append(append([]byte("HPKE-v1"), suite...), label...), input...)
	return must(hkdf.Extract(sha256.New, labeled, salt))
}

func expand(secret []byte, label string, context []byte, length int) []byte {
	labeled := binary.BigEndian.AppendUint16(nil, uint16(length))
	labeled = append(append(append(append(labeled, "HPKE-v1"...), suite...), label...), context...)
	return must(hkdf.Expand(sha256.New, secret, string(labeled), length))
}

func must[T any](value T, err error) T {
	check(err)
	return value
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
