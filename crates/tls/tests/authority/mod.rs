//! Answers for certificates that tests need, good and bad.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};

/// Who signs.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// Days from now, from and until which a certificate is good.
type Days = (i64, i64);

impl Authority {
    pub fn new(name: &str) -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn sign(&self, (dir, what): (&Path, &str), name: &str, days: Days) {
        let key = KeyPair::generate().unwrap();
        let mut params =
            CertificateParams::new(vec![name.to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![match what {
            "server" => ExtendedKeyUsagePurpose::ServerAuth,
            _ => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        let now = time::OffsetDateTime::now_utc();
        params.not_before = now + time::Duration::days(days.0);
        params.not_after = now + time::Duration::days(days.1);
        let signed = params.signed_by(&key, &self.0).unwrap();
        std::fs::write(dir.join("ca-cert.pem"), self.0.pem()).unwrap();
        std::fs::write(dir.join(format!("{what}-cert.pem")), signed.pem()).unwrap();
        std::fs::write(dir.join(format!("{what}-key.pem")), key.serialize_pem()).unwrap();
    }

    pub fn server(&self, dir: &Path, name: &str, days: Days) {
        self.sign((dir, "server"), name, days);
    }

    pub fn client(&self, dir: &Path, name: &str, days: Days) {
        self.sign((dir, "client"), name, days);
    }
}
